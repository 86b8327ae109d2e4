"""What a node's schema needs so that its text is shown again where the host kept the result of an earlier run."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

SHOWS_TEXT: dict[str, Any] = {"has_intermediate_output": True} if "has_intermediate_output" in io.Schema.__dataclass_fields__ else {}
"""For `io.Schema`; hosts that do not know it show the text of a kept result only on output nodes."""

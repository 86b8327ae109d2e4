"""An adapter around another, for measuring: what it does not define itself is the inner one's."""

from __future__ import annotations

from typing import Any

from ..models.adapter import ModelAdapter


class Around:
    def __init__(self, inner: ModelAdapter) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

"""An adapter around another, for measuring: what it does not define itself is the inner one's, as protocols want to find it.

Only rows in one pass are not, unless it defines them: its `forward` is to see every chunk.
"""

from __future__ import annotations

from ..models.adapter import ModelAdapter


class Around:
    def __init__(self, inner: ModelAdapter) -> None:
        self.inner = inner
        others = [name for name in dir(inner) if not name.startswith("_") and not hasattr(type(self), name) and name not in ("inner", "forward_row")]
        vars(self).update({name: getattr(inner, name) for name in others})

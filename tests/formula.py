"""An adapter whose network is a formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flowcache_core.models.adapter import Call
from flowcache_core.network import Attend


class Fields:
    """velocity = field(sigma), and the residual is the velocity as well. `patch`: cells of a token, along each side."""

    name, layers, heads, query_heads, head_dim, width, text_channels, rotary = "fields", 1, 1, 1, 4, 4, 4, None
    polynomial = ()
    patch = 1

    def __init__(self, field: Callable[[float], Tensor]) -> None:
        self.field = field

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch, width // self.patch

    def tokens_per_frame(self, height: int, width: int) -> int:
        return height * width // self.patch**2

    def text(self, context: Tensor) -> Tensor:
        return context

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        velocity = self.field(call.sigma)
        return velocity, velocity

    def replay(self, call: Call, residual: Tensor) -> Tensor:
        return residual

    def time_changes(self, sigmas: Any, fps: int, device: Any) -> list[float]:
        return [0.0] * len(sigmas)

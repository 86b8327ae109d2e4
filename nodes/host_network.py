"""A family's network under ComfyUI's calling convention; which files weights come from is not known here."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..flowcache_core.models.adapter import require_bidirectional
from ..flowcache_core.models.family import Family
from ..flowcache_core.run.run import Turn
from .settings_on_model import nodes_of, wrong_sampler

TURN = "flowcache_turn"
"""Key in transformer_options under which our sampler hands over what it evaluates."""


@lru_cache
def host_network(family: Family) -> type[Any]:
    """The class of the family's network. With a turn it is one step of our sampler, without it a whole film."""

    class HostNetwork(family.network):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any, dtype: Any = None, device: Any = None, operations: Any = None, **unused: Any) -> None:
            super().__init__(config, operations=operations, device=device, dtype=dtype)

        def forward(self, x, timestep, context=None, control=None, transformer_options=None, **unused):  # type: ignore[no-untyped-def]
            options = transformer_options or {}
            turn: Turn | None = options.get(TURN)
            if turn is not None:
                return turn.denoise(x, context, tuple(options["uuids"]))
            if nodes := nodes_of({"transformer_options": options}):
                raise ValueError(wrong_sampler(nodes))
            return require_bidirectional(family.adapter(self, x.dtype)).film(x, timestep, context)

    return HostNetwork

"""A family's network under ComfyUI's calling convention; which files weights come from is not known here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..flowcache_core.kernels.attention import attending
from ..flowcache_core.models.adapter import require_bidirectional
from ..flowcache_core.models.family import Family, OpenBlocks
from ..flowcache_core.run.turn import Turn
from .host_attention import kernel_on
from .other_nodes import BASE, Replace, blocks_of, name_of, require_served_now
from .settings_on_model import nodes_of, wrong_sampler

TURN = "flowcache_turn"
"""Key in transformer_options under which our sampler hands over what it evaluates."""

LEVELS = "flowcache_levels"
"""Key in transformer_options: noise levels [F, 1, 1] of the latent frames, where they differ in an evaluation."""


@lru_cache
def host_network(family: Family) -> type[Any]:
    """The class of the family's network. With a turn it is one step of our sampler, without it a whole film."""

    class HostNetwork(family.network):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any, dtype: Any = None, device: Any = None, operations: Any = None, **unused: Any) -> None:
            super().__init__(config, operations=operations, device=device, dtype=dtype)
            self._replaced: dict[int, Replace] = {}
            self._options: dict[str, Any] = {}

        def forward(self, x, timestep, context=None, control=None, transformer_options=None, **unused):  # type: ignore[no-untyped-def]
            options = transformer_options or {}
            require_served_now(options, type(self))
            if x.ndim != 5:
                raise ValueError(f"{family.title} makes films, and was given latents of shape {tuple(x.shape)}: use Empty AR Video Latent")
            turn: Turn | None = options.get(TURN)
            if turn is None and (nodes := nodes_of({"transformer_options": options})):
                raise ValueError(wrong_sampler(nodes))
            base = options.get(BASE, {})
            blocks = base if turn is not None and turn.committing else blocks_of(options)
            with self.replacing(blocks, options), attending(kernel_on(x.device, options)):
                if turn is not None:
                    return turn.denoise(x, context, tuple(options["uuids"]), None if blocks == base else name_of(blocks))
                return require_bidirectional(family.adapter(self, x.dtype)).film(x, timestep, context)

        @contextmanager
        def replacing(self, blocks: dict[int, Replace], options: dict[str, Any]) -> Iterator[None]:
            """Until the block ends, these functions stand for blocks of the network."""
            self._replaced, self._options = blocks, options
            try:
                yield
            finally:
                self._replaced, self._options = {}, {}

    class OpenHostNetwork(HostNetwork):
        def through(self, layer: int, block: Any, tokens: Tensor, e0: Any, text: Any, rope: Any, attend: Any) -> Tensor:
            through = super().through
            if layer not in self._replaced:
                return through(layer, block, tokens, e0, text, rope, attend)

            def original(args: dict[str, Any]) -> dict[str, Any]:
                return {"img": through(layer, block, args["img"], args["vec"], args["txt"], args["pe"], attend)}

            given = {"img": tokens, "txt": text, "vec": e0, "pe": rope, "transformer_options": self._options}
            out: Tensor = self._replaced[layer](given, {"original_block": original})["img"]
            return out

    return OpenHostNetwork if issubclass(family.network, OpenBlocks) else HostNetwork  # type: ignore[arg-type]

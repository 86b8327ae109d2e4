"""How a guider evaluates chunks.

Nodes around guidance are told one noise level, and may keep something from one evaluation to the next: they are asked once for each level that
chunks are at, and what they keep is kept apart for each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import CellType
from typing import Any

import comfy.model_management
import comfy.samplers
import torch

from ..flowcache_core.kv.cache import Branches
from ..flowcache_core.run.identity import rebound
from ..flowcache_core.run.turn import Turn, WrappedTurn
from .guidance import conds_of
from .host_network import LEVELS, TURN
from .other_nodes import around_guidance
from .states import NamedTurn
from .texts import ChunkConds


@dataclass(frozen=True)
class Guidance:
    """The host's guider as the run evaluates by it. `sigmas`: the run's noise levels as the host has them, `levels`: as numbers; `alike`: nothing
    but CFG is around the network, which goes by no level."""

    guider: Any
    extra_args: dict[str, Any]
    texts: ChunkConds
    sigmas: torch.Tensor
    levels: Sequence[float]
    alike: bool
    kept: KeptByChunk

    @classmethod
    def of(cls, guider: Any, extra_args: dict[str, Any], texts: ChunkConds, sigmas: torch.Tensor, levels: Sequence[float], alike: bool) -> Guidance:
        kept = KeptByChunk(around_guidance(guider.model_patcher, extra_args["model_options"]))
        return cls(guider, extra_args, texts, sigmas, levels, alike, kept)

    @property
    def options(self) -> dict[str, Any]:
        out: dict[str, Any] = self.extra_args["model_options"]["transformer_options"]
        return out

    def __call__(self, turn: Turn, x: torch.Tensor) -> torch.Tensor:
        """x [films, C, F, h, w] -> guided velocity."""
        apart = not self.alike and bool(turn.levels)
        self.options[TURN] = named = NamedTurn(OncePerText(turn) if apart else turn, self.texts.at(turn.reads))
        out = self._by_level(named, x) if apart else self._at(turn.step, turn.start, x)
        write_the_rest(named, self.guider, x, self.sigmas[turn.step], self.extra_args["model_options"])
        return out

    def _at(self, step: int, chunk: int, x: torch.Tensor) -> torch.Tensor:
        with self.kept.of(chunk):
            return velocity(self.guider, x, self.sigmas[step], self.levels[step], self.extra_args)

    def _by_level(self, turn: Turn, x: torch.Tensor) -> torch.Tensor:
        """Of every chunk what is guided at its own level, out of one evaluation of the network."""
        out = torch.zeros_like(x)
        self.options[LEVELS] = torch.tensor(turn.levels, device=x.device, dtype=torch.float32).view(-1, 1, 1)
        try:
            for step in sorted({step for step, _ in turn.parts}):
                mine = [frames for at, frames in turn.parts if at == step]
                guided = self._at(step, turn.start + mine[0].start, x)
                for frames in mine:
                    out[:, :, frames] = guided[:, :, frames]
        finally:
            del self.options[LEVELS]
        return out

    def end(self) -> None:
        """Nodes are left as they were found."""
        self.options.pop(TURN, None)
        self.kept.restore()


@dataclass(frozen=True)
class OncePerText(WrappedTurn):
    """A turn that is asked several times: with the same latents, text and blocks the network is evaluated once."""

    _known: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """By branch, text and blocks: latents [films, C, F, h, w], and their velocity."""

    def unwritten(self, branches: Iterable[Hashable]) -> tuple[Hashable, ...]:
        return self.turn.unwritten(branches)

    def denoise(self, x: torch.Tensor, context: torch.Tensor, branches: Branches, blocks: Hashable = None, texts: Hashable = None) -> torch.Tensor:
        keys = [(branch, text, blocks) for branch, text in zip(branches, texts if isinstance(texts, tuple) else branches, strict=True)]
        parts, contexts = x.chunk(len(keys)), context.chunk(len(keys))
        missing = [k for k, key in enumerate(keys) if key not in self._known or not torch.equal(self._known[key][0], parts[k])]
        if missing:
            own = tuple(branches[k] for k in missing)
            made = self.turn.denoise(torch.cat([parts[k] for k in missing]), torch.cat([contexts[k] for k in missing]), own, blocks, texts)
            self._known.update((keys[k], (parts[k], part)) for k, part in zip(missing, made.chunk(len(missing)), strict=True))
        return torch.cat([self._known[key][1] for key in keys])


class KeptByChunk:
    """What functions of other nodes keep in variables of their own from one call to the next, such as APG its momentum."""

    def __init__(self, functions: Iterable[Callable[..., Any]]) -> None:
        self._cells = [cell for function in functions for cell in rebound(function)]
        self._found = [_content(cell) for cell in self._cells]
        self._of: dict[Hashable, list[tuple[Any, ...]]] = {}

    @contextmanager
    def of(self, chunk: Hashable) -> Iterator[None]:
        """Until the block ends they have what they kept in the last block of this chunk; before its first, what they had when the run began."""
        self._put(self._of.get(chunk, self._found))
        try:
            yield
        finally:
            self._of[chunk] = [_content(cell) for cell in self._cells]

    def restore(self) -> None:
        """They have again what they had when the run began."""
        self._put(self._found)
        self._of.clear()

    def _put(self, contents: list[tuple[Any, ...]]) -> None:
        for cell, content in zip(self._cells, contents, strict=True):
            if content:
                (cell.cell_contents,) = content
            else:
                del cell.cell_contents


def _content(cell: CellType) -> tuple[Any, ...]:
    with suppress(ValueError):
        return (cell.cell_contents,)
    return ()


def velocity(guider: Callable[..., torch.Tensor], x: torch.Tensor, sigma: torch.Tensor, level: float, extra_args: dict[str, Any]) -> torch.Tensor:
    """What the guider makes of the network's velocity: it speaks of clean latents at one noise level, x - sigma * velocity.

    `level`: the same as `sigma`, as the host knows it: nobody waits for the device to say it.
    """
    comfy.model_management.throw_exception_if_processing_interrupted()
    clean = guider(x, sigma * x.new_ones(x.shape[0]), **extra_args)
    return (x - clean) / sigma if level else clean


def write_the_rest(turn: Turn, guider: Any, x: torch.Tensor, sigma: torch.Tensor, model_options: dict[str, Any]) -> None:
    """A commit is for all branches, also for those that guidance leaves out at its noise level: nodes that change CFG, or texts for some steps."""
    conds = {one["uuid"]: one for many in guider.conds.values() for one in many}
    if rest := [conds[branch] for branch in turn.unwritten(one["uuid"] for one in conds_of(guider)) if branch in conds]:
        always = [[{key: value for key, value in one.items() if not key.startswith("timestep_")}] for one in rest]
        comfy.samplers.calc_cond_batch(guider.inner_model, always, x, sigma * x.new_ones(x.shape[0]), model_options)

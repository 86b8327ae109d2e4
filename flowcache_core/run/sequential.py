"""The KV cache of a film that another sampler makes: chunk after chunk, each finished before the next begins.

That sampler calls the network; here it is decided, for every evaluation, what it attends with and whether it is needed. A chunk is evaluated
once per step and once more from its clean latent, which writes its keys and values anew. It becomes history when the next one begins, never
between its evaluations.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..kv.cache import Branches, CachedAttention, KVSizes, KVStore
from ..kv.compressor import Budget, Compressor
from ..kv.forecast import forecast_history
from ..kv.keeper import Keeper
from ..kv.layout import Layout, capacity
from ..models.causal_wan import FPS, HORIZON, CausalWan
from ..sampling.chunk import Chunk
from ..sampling.schedule import ChunkSchedule
from .footprint import readable


@dataclass(frozen=True)
class SequentialFilm:
    """What is known of a film before its run. `grid`: height and width of a latent frame; `films`: side by side; `branches`: of guidance;
    `itemsize`: bytes of a number as computed; `text_tokens`: of all branches and films together.

    `clean_pass`: whether history has the keys and values of clean latents, as the models are trained; otherwise those of a chunk's last step,
    and no chunk is evaluated clean.
    """

    network: CausalWan
    schedule: ChunkSchedule
    budget: Budget
    grid: tuple[int, int]
    films: int
    branches: int
    itemsize: int
    text_tokens: int = 0
    clean_pass: bool = True

    @classmethod
    def settled(cls, network: CausalWan, compressor: Compressor, frames: int, chunk_frames: int, steps: int, grid: tuple[int, int],
                films: int = 1, branches: int = 1, itemsize: int = 2, given: int = 0, text_tokens: int = 0,
                device: torch.device | str = "cpu", clean_pass: bool = True, horizon: int = HORIZON, fps: int = FPS) -> SequentialFilm:  # fmt: skip
        """`given`: latent frames at the start that are shown to the network once, in one piece; `horizon`: latent frames of the films in training.

        Raises ValueError, with the way out, for what cannot be laid out and for a budget that is too small.
        """
        if given > chunk_frames:
            raise ValueError(f"{given} latent frames are given at the start, and a chunk has {chunk_frames}: give at most {chunk_frames}")
        schedule = ChunkSchedule(frames, chunk_frames, steps, steps, max(horizon // chunk_frames, 1), given)
        budget = compressor.budget_for(network, schedule, grid, fps, films * branches, itemsize, device)
        return cls(network, schedule, budget, grid, films, branches, itemsize, text_tokens, clean_pass)

    @property
    def frame_tokens(self) -> int:
        return self.network.tokens_per_frame(*self.grid)

    @cached_property
    def sizes(self) -> KVSizes:
        return KVSizes.of(self.network, self.films, capacity(self.schedule, self.frame_tokens, self.budget.slots))

    @property
    def kv(self) -> int:
        """Bytes of the KV cache, with what the policy holds beside it."""
        return self.budget.bytes(self.sizes, self.branches, self.itemsize)

    @property
    def kv_unbounded(self) -> int:
        """Bytes of the keys and values of the whole film."""
        return self.films * self.branches * self.schedule.frames * self.frame_tokens * self._token

    @property
    def held(self) -> int:
        """Bytes that the run holds until it ends, beside the weights and the film."""
        return self.kv + self.text_tokens * self._token

    @property
    def longest(self) -> int:
        """Latent frames of the longest evaluation."""
        return max(self.schedule.span(index)[1] for index in range(self.schedule.chunks))

    @property
    def passes(self) -> tuple[int, int]:
        """Clean evaluations that are left out, and all evaluations that the sampler asks for."""
        made = self.schedule.chunks - self.schedule.given
        return 1 if self.clean_pass else made, self.schedule.given + made * (self.schedule.steps + 1)

    def needs_clean(self, index: int) -> bool:
        """Whether a chunk is evaluated clean: nothing looks back on the last one."""
        return index < self.schedule.given or (self.clean_pass and index < self.schedule.chunks - 1)

    @property
    def _token(self) -> int:
        """Bytes of a key and a value in all layers."""
        return 2 * self.network.layers * self.network.width * self.itemsize

    def forecast(self) -> tuple[str, ...]:
        """Sentences for the log, before anything runs."""
        kept = forecast_history(self.budget, replace(self.schedule, window=None), self.frame_tokens)
        taken = f"at its peak the KV cache takes {readable(self.kv)} ({readable(self.kv_unbounded)} without the budget)"
        out, of = self.passes
        which = "the clean pass of the last chunk, which nothing looks back on, is" if self.clean_pass else "clean passes are"
        return kept, taken, f"{which} left out: {of - out} of {of} evaluations"


class SequentialCache:
    """Of one run. Whoever makes one frees it."""

    def __init__(self, film: SequentialFilm) -> None:
        self.film, self.schedule, self.peak = film, film.schedule, 0
        """`peak`: the most bytes that the caches took."""
        self.keeper, self.store = self._empty()
        self._at = {self.schedule.span(index)[0]: index for index in range(self.schedule.chunks)}
        self._chunk: Chunk | None = None
        self._step = 0
        self._ran: set[Hashable] = set()
        self._now: set[Hashable] = set()
        """Branches that have run for the chunk, and of these the ones at its present step."""

    def _empty(self) -> tuple[Keeper, KVStore]:
        film, budget, network = self.film, self.film.budget, self.film.network
        layout = Layout(film.schedule, film.frame_tokens, budget.slots)
        keeper = Keeper(budget, film.schedule, network.layers, film.films, network.token_grid(*film.grid), network.rotary)
        return keeper, KVStore(film.sizes, layout, keeper, budget.cache_of(film.sizes, layout))

    @property
    def kept(self) -> set[int]:
        """The finished chunks of which history has something."""
        return self.keeper.chunks

    def index(self, frame: int, frames: int) -> int:
        """The chunk that begins at a latent frame. Raises ValueError for none, or one of another length."""
        index = self._at.get(frame)
        if index is None or self.schedule.span(index)[1] != frames:
            raise ValueError(
                f"{frames} latent frames from number {frame} on are none of the film's chunks: bypass the nodes that cut it on its way to the network"
            )
        return index

    def restart(self) -> tuple[Chunk, ...]:
        """Empties history, for a film that goes on with another text (the KV recache of LongLive, arXiv 2509.22622).

        -> the chunks of which it had something. Whoever calls evaluates them once more, clean and in order: each looks back on those before it,
        and becomes history anew within the budget. What was given up before stays so.
        """
        if self._chunk is None:
            return ()
        self._finish(self._chunk)
        finished, kept = self._chunk.index + 1, sorted(self.kept)
        self.store.free()
        self.keeper, self.store = self._empty()
        self.store.gone = frozenset(range(finished)).difference(kept)
        self._chunk = None
        return tuple(self.schedule.at(index, self.schedule.steps) for index in kept)

    def begin(self, frame: int, frames: int, clean: bool) -> bool:
        """The next evaluation of the chunk that begins at a latent frame -> whether it is needed. `clean`: from its clean latent.

        The chunk before becomes history. Raises ValueError where it cannot: the evaluation that history is made of was not run in all branches.
        """
        index = self.index(frame, frames)
        if self._chunk is None or self._chunk.index != index:
            self._turn_to(index)
        elif clean and not self.film.needs_clean(index):
            return False
        self._step += 1
        stays = clean or (not self.film.clean_pass and self._step == self.schedule.steps)
        self._chunk, self._now = self.schedule.at(index, self.schedule.steps if stays else 0), set()
        self._measure()
        return True

    def _turn_to(self, index: int) -> None:
        if self._chunk is not None:
            self._finish(self._chunk)
        self._step = 0

    def attention(self, branches: Branches) -> CachedAttention:
        """What these branches attend with. A branch that has run in this evaluation already, for guidance, leaves no keys and values."""
        if self._chunk is None:
            raise RuntimeError("an evaluation of no chunk: begin one first")
        again = bool(self._now.intersection(branches))
        self._now.update(branches)
        self._ran.update(branches)
        return self.store.attention(branches, self._chunk, aside=again)

    def free(self) -> None:
        self._measure()
        self.store.free()

    def _finish(self, chunk: Chunk) -> None:
        if not chunk.committing or self._ran != self._now:
            raise ValueError(
                f"chunk {chunk.index + 1} was not evaluated {'from its clean latent' if self.film.clean_pass else 'at its last step'} with every "
                "text of guidance, so later chunks would look back on noise: let every prompt count at all noise levels, without a time range, and "
                "bypass nodes that skip evaluations"
            )
        self.store.settle(chunk)
        self.keeper.locate()
        self._ran.clear()

    def _measure(self) -> None:
        self.peak = max(self.peak, self.store.bytes)

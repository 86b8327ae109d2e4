"""The device of a shared run that has the guider: what it evaluates, all evaluate, and where it moves a chunk to, all move it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..kv.cache import Branches
from ..ranks.rendezvous import LateGroup
from .identity import film_of
from .report import RunReport
from .run import Observer, Run
from .shared import Evaluation, own_branches
from .states import States
from .turn import Evaluate, Turn, WrappedTurn

Send = Callable[..., None]
"""A message to all others."""


def described(x: Tensor) -> dict[str, Any]:
    """By which another device makes room for a tensor."""
    return {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Leader:
    """`branches`: of the film, in order; `everyone`: all its devices."""

    run: Run
    branches: tuple[str, ...]
    everyone: LateGroup
    send: Send
    _texts: dict[tuple[str, ...], Hashable] = field(default_factory=dict)
    """The texts of each branch that the others have."""
    _numbers: dict[Hashable, int] = field(default_factory=dict)

    def sample(self, x: Tensor, evaluate: Evaluate, observer: Observer | None = None, states: States | None = None) -> tuple[Tensor, RunReport]:
        """As `Run.sample`, on all devices, each of which saves its own share. The report has what was expected of them, and what came."""
        states = states and replace(states, named=film_of(self.run, x, states.film))
        self._give("begin", {"x": x}, states=states and states.as_json())

        def led(turn: Turn, part: Tensor) -> Tensor:
            out = evaluate(LedTurn(turn, self), part)
            self._give("move", {} if turn.committing else {"x": out})
            return out

        latents, report = self.run.sample(x, led, observer, states)
        spread = self.run.spread
        report.notes, report.devices = (*report.notes, spread.expectation, spread.line), spread.as_dict()
        return latents, report

    def evaluate(self, turn: Turn, x: Tensor, context: Tensor, branches: tuple[str, ...], texts: Hashable) -> Tensor:
        number = self._numbers.setdefault(texts, len(self._numbers))
        known = self._texts.get(branches) == number
        self._texts[branches] = number
        at = [turn.index, turn.step, turn.committing]
        self._give("evaluate", {"x": x} if known else {"x": x, "context": context}, at=at, branches=branches, texts=number)
        return Evaluation(x, context, branches, number).by(turn, self.run, self.branches)

    def _give(self, what: str, tensors: Mapping[str, Tensor], **more: Any) -> None:
        self.send(do=what, **more, tensors={name: described(one) for name, one in tensors.items()})
        for one in tensors.values():
            self.everyone.from_first(one.contiguous())


@dataclass(frozen=True)
class LedTurn(WrappedTurn):
    """A turn that all devices evaluate."""

    leader: Leader

    def unwritten(self, branches: Iterable[Hashable]) -> tuple[Hashable, ...]:
        return self.turn.unwritten(own_branches(branches, self.leader.run.spread, self.leader.branches))

    def denoise(self, x: Tensor, context: Tensor, branches: Branches, blocks: Hashable = None, texts: Hashable = None) -> Tensor:
        if blocks is not None:
            raise ValueError("a node replaces blocks of the network, which the other devices of this film do not: bypass that node, or Devices")
        return self.leader.evaluate(self.turn, x, context, tuple(map(str, branches)), texts)

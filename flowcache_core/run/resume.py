"""A run that is saved every few chunks, between two rows, and goes on where an earlier run of the same film stood.

What a run remembers is listed in `remembered.py`, what a film depends on in `identity.py`, where states lie in `states.py`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..memory import Remembers
from ..models.numbers import finite
from ..ranks.world import Spread
from ..sampling.loop import Checkpoints, LoopState, NoCheckpoints
from ..untrusted import short
from .identity import film_of
from .remembered import Reader, Writer, kinds_of
from .report import RunReport
from .sections import SectionSession
from .session import Session
from .state_file import StateFile, write_state
from .states import States, not_saved, not_used, size_of

if TYPE_CHECKING:
    from .run import Observer, Run


class Unreadable(ValueError):
    """A state that is whole, and yet not of such a run."""


FAULTS = (ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError)
"""Errors of Python that values of a wrong state lead to; torch raises RuntimeError, and its subclasses for a lack of memory and a broken device."""


class RunCheckpoints(Checkpoints, Protocol):
    """The same, as a run sees it that opens a session."""

    def attach(self, session: Session | SectionSession, observer: Observer) -> tuple[str, ...]:
        """A session has been opened: puts it where the earlier run stood -> what there is to say. Raises Unreadable, as `restore` does."""
        ...

    def refuse(self, why: Unreadable) -> None:
        """What was found does not fit: the next session begins anew."""
        ...

    def require(self, latents: Tensor) -> None:
        """Of the whole film. Raises ValueError where the run was resumed and they are not numbers."""
        ...

    def explain(self, error: Exception) -> None:
        """The run has failed. Raises ValueError, with the state's name, where it was resumed and the state may be the cause."""
        ...

    def finish(self) -> None:
        """The film is there."""
        ...


class NoFileCheckpoints(NoCheckpoints):
    """A run that keeps nothing and begins at the beginning."""

    def attach(self, session: Session | SectionSession, observer: Observer) -> tuple[str, ...]:
        return ()

    def refuse(self, why: Unreadable) -> None: ...

    def require(self, latents: Tensor) -> None: ...

    def explain(self, error: Exception) -> None: ...

    def finish(self) -> None: ...


class FileCheckpoints:
    """Of one run. `noise`: the latents that it is handed."""

    def __init__(self, states: States, run: Run, noise: Tensor) -> None:
        self.states, self.run, self.film = replace(states, part=run.spread.place), run, states.named or film_of(run, noise, states.film)
        self.section: int | None = None
        self._kinds = kinds_of(run.policy, run.compressor.policy if run.compressor else None, run.solver, run.solver.skipping)
        self._finished_since, self._failed, self._resumed = 0, False, False
        self._notes: list[str] = []
        self._found = self._agreed(self._look())
        self._reader: Reader | None = None
        self._session: Session | SectionSession | None = None
        self._observer: Observer | None = None

    def _look(self) -> StateFile | None:
        try:
            found = self.states.find(self.film)
        except (OSError, ValueError) as error:
            self._notes = [not_used(error)]
            return None
        self._notes = [] if found else [line for line in [self.states.nearest(self.film)] if line]
        return found

    def _agreed(self, found: StateFile | None) -> StateFile | None:
        """None where the devices of the film have not all found a state, or not of the same row."""
        spread, row = self.run.spread, _row(found)
        if -spread.agreed(-row) == spread.agreed(row):
            return found
        self._notes = ["states of this film were saved, but not by all of its devices, or not at the same row: the film begins anew"]
        return None

    def attach(self, session: Session | SectionSession, observer: Observer) -> tuple[str, ...]:
        self._session, self._observer = session, observer
        if self._found is not None:
            self._put(self._found, session=session)
            self._require_plans(session)
            self._require_report(session.report)
            self.section = self._shown(self._found)
            self._notes = [_goes_on(self._found, made_with(self.run.place.device))]
        try:
            self.states.try_out(self.film)
        except OSError as error:
            self._failed = True
            self._notes.append(not_saved(error))
        session.report.notes += tuple(self._notes)
        return tuple(self._notes)

    def restore(self, loop: LoopState) -> None:
        if self._found is None:
            return
        self._put(self._found, loop=loop, **self._observed())
        rows = (self.run.sections[loop.section].schedule if self.run.sections else self.run.schedule).rows
        if not 0 <= loop.row < len(rows):
            raise Unreadable(f"it stands at row {loop.row} of {len(rows)}")
        if missing := {chunk.index for row in rows[loop.row :] for chunk in row.active} - loop.walk_of.keys():
            raise Unreadable(f"it does not say how chunk {min(missing) + 1} goes on")
        self._found, self._reader, self._resumed = None, None, True

    def after_row(self, loop: LoopState, finished: int) -> None:
        self._finished_since += finished
        if self._finished_since >= self.states.every:
            self._finished_since = 0
            self._save(loop)

    def refuse(self, why: Unreadable) -> None:
        if self.states.part is not None:
            path = self.states.path(self.film)
            raise ValueError(
                f"the saved state {path.name} cannot be used ({why}), and other devices of the film go on from theirs: remove the states of the film "
                f"from {short(path.parent.name)}, and it begins anew"
            ) from why
        self._found = self._reader = self.section = None
        self._notes = [not_used(why)]

    def require(self, latents: Tensor) -> None:
        if self._resumed and not finite(latents):
            raise ValueError("its latents hold NaN or infinity")

    def explain(self, error: Exception) -> None:
        if not self._resumed or not (isinstance(error, FAULTS) or type(error) is RuntimeError):
            return
        path = self.states.path(self.film)
        raise ValueError(
            f"the run went on from the saved state {path.name} and failed ({type(error).__name__}: {short(error, 300)}): if it fails again, remove "
            f"that file from {short(path.parent.name)}, and the film begins anew"
        ) from error

    def finish(self) -> None:
        if not self.states.keep:
            self.states.drop(self.film)

    def _put(self, found: StateFile, **what: object) -> None:
        """Each thing where the earlier run had it."""
        try:
            with found.tensors() as tensor_of:
                reader = self._reader = self._reader or Reader(self._kinds, tensor_of, self.run.place.device)
                reader.tensor_of = tensor_of
                for name, one in what.items():
                    reader.put(one, found.tree[name])
        except torch.OutOfMemoryError:
            raise  # of the device, not of the state, which stays
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise Unreadable(f"it does not fit this run ({type(error).__name__}: {short(error)})") from error

    def _require_plans(self, session: Session | SectionSession) -> None:
        plans = session.plans or () if isinstance(session, SectionSession) else (session.plan,)
        schedules = [one.schedule for one in self.run.sections] or [self.run.schedule]
        try:
            for plan, schedule in zip(plans, schedules, strict=True):
                if plan is None:
                    raise Unreadable("it has no plan")
                plan.check(schedule)
        except ValueError as error:
            raise Unreadable(f"it does not fit this run ({short(error)})") from error

    def _require_report(self, report: RunReport) -> None:
        try:
            report.as_dict()
            report.text()
        except FAULTS as error:
            raise Unreadable(f"it does not fit this run ({type(error).__name__}: {short(error)})") from error

    def _shown(self, found: StateFile) -> int:
        """In which the earlier run stood: walks of this section have to be there before the loop is put in place."""
        match found.tree:
            case {"loop": {"fields": {"section": int(section)}}} if 0 <= section < max(len(self.run.sections), 1):
                return section
        raise Unreadable("it does not say where in the film it stands")

    def _save(self, loop: LoopState) -> None:
        assert self._session is not None
        report, began, parts = self._session.report, time.perf_counter(), Parts(self.run.spread)
        try:
            writer = Writer(self._kinds)
            tree = {name: writer.write(one, name) for name, one in {"session": self._session, "loop": loop, **self._observed()}.items()}
            size = write_state(self.states.path(self.film), self._metadata(loop), tree, writer.tensors, parts.written)
        except (OSError, TypeError) as error:
            parts.failed()
            self._fail(error)
            return
        report.saves.add(time.perf_counter() - began, size)
        self.states.tidy()

    def _observed(self) -> dict[str, object]:
        """The observer, where it remembers something."""
        return {"observer": self._observer} if isinstance(self._observer, Remembers) else {}

    def _metadata(self, loop: LoopState) -> dict[str, object]:
        assert self._session is not None
        done = sum(bool((row != 0).all()) for row in self._session.report.map)
        return {
            "film": self.film,
            "chunks": [done, self.run.chunks - self.run.schedule.given],
            "row": loop.row,
            "made with": made_with(self.run.place.device),
            "at": f"{datetime.now():%Y-%m-%d %H:%M}",
        }

    def _fail(self, error: Exception) -> None:
        """Reported once; the next time it is tried again."""
        if self._failed:
            return
        assert self._session is not None
        assert self._observer is not None
        self._failed, notes = True, (not_saved(error),)
        self._session.report.notes += notes
        self._observer.begin(self._session.report, notes)


class Parts:
    """One state, of which every device of the film has written a part: all of the parts come in place, or none."""

    def __init__(self, spread: Spread) -> None:
        self.spread, self._asked = spread, False

    def written(self) -> None:
        """Raises OSError where another device has failed."""
        self._asked = True
        if self.spread.agreed(0.0):
            raise OSError("another device of this film cannot write its part")

    def failed(self) -> None:
        if not self._asked:
            self.spread.agreed(1.0)


def _row(found: StateFile | None) -> float:
    """Where it stands; less than any row where nothing was found."""
    match found.metadata.get("row") if found else None:
        case int(row):
            return row
    return -1.0


def made_with(device: torch.device) -> str:
    """What rounding depends on."""
    return f"torch {torch.__version__} on {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"


def _goes_on(found: StateFile, now: str) -> str:
    then = short(found.metadata.get("made with"))
    rounding = "" if then == now else f"; that was {then} and this is {now}, so the last bits of what follows may differ"
    return f"goes on from a saved state: {size_of(found.metadata)} were finished at {short(found.metadata.get('at'))}{rounding}"

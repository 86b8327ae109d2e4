"""Saved states of runs, damaged or crafted at random, for `tests.fuzz`: the run is resumed and goes on to its end."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores import H2O
from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.run.report import RunReport
from flowcache_core.run.run import Film, NoObserver, Observer, Run
from flowcache_core.run.state_file import SUM_BYTES, metadata_of, read_state
from flowcache_core.run.states import States
from flowcache_core.run.turn import Turn
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule, sections_of
from flowcache_core.sampling.solvers import Multistep, UniPC
from tests.fuzz_values import Random, damaged, text, value

STEPS, SIDE, LONG = 3, 4, 1000
CAUSAL: Film = ChunkSchedule(6, 2, STEPS, 2, window=2)
NOTE = 500
"""Characters of a note on a state at most."""
WHOLE = 0.2
"""Share of the states that are not used of which the film is made and compared."""


class Stopped(Exception):
    pass


@dataclass(frozen=True)
class Setup:
    """A run and its noise."""

    run: Run
    noise: Tensor
    text: Tensor

    def make(
        self, folder: Path | None = None, evaluations: int = 10**6, every: int = 1, observer: Observer | None = None
    ) -> tuple[Tensor, RunReport]:
        """Raises Stopped after so many evaluations."""
        left = iter(range(evaluations))

        def evaluate(turn: Turn, x: Tensor) -> Tensor:
            if next(left, None) is None:
                raise Stopped
            return turn.denoise(x, self.text, ("cond",))

        return self.run.sample(self.noise.clone(), evaluate, observer, States(folder, every) if folder else None)

    @cached_property
    def whole(self) -> Tensor:
        return self.make()[0]

    @cached_property
    def evaluations(self) -> int:
        """Of the whole run."""
        count = 0

        def counted(turn: Turn, x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return turn.denoise(x, self.text, ("cond",))

        self.run.sample(self.noise.clone(), counted)
        return count

    def saved(self, folder: Path, evaluations: int) -> tuple[str, bytes]:
        """Name and contents of the last state that the run writes within so many evaluations."""
        with suppress(Stopped):
            self.make(folder, evaluations)
        (path,) = folder.iterdir()
        found = path.name, path.read_bytes()
        path.unlink()
        return found


def setups() -> list[Setup]:
    """One of every sort of memory: chunk by chunk, by cell, by token under a budget, by section."""
    torch.manual_seed(0)
    net = SkyReelsV2(SkyReelsConfig(128, 8, 1, 4)).eval().requires_grad_(False)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    adapter, noise, said = SkyReelsAdapter(net), torch.randn(1, 16, 6, SIDE, SIDE), torch.randn(1, 2, 4)
    sections = sections_of(6, 2, STEPS, 1, 4, 2)
    made: list[tuple[Film, dict[str, Any]]] = [
        (CAUSAL, {"policy": Chunkwise(0.5, 1, signature="latent"), "solver": UniPC()}),
        (CAUSAL, {"policy": Multirate(share=0.6)}),
        (CAUSAL, {"policy": Motion(0.6, base=Chunkwise(0.6, 1), min_refresh=0.0), "compressor": Compressor(H2O(), 1.0, "chunks", sink=0)}),
        (sections, {"solver": Multistep()}),
    ]
    levels = flow_sigmas(STEPS)
    return [Setup(Run(SKYREELS, adapter, film, levels, (16, SIDE, SIDE), **more), noise, said) for film, more in made]


@dataclass
class Parts:
    """A state taken apart."""

    header: dict[str, Any]
    tensors: bytes
    tree: Any

    @classmethod
    def of(cls, data: bytes) -> Parts:
        length = struct.unpack("<Q", data[:8])[0] + 8
        header = json.loads(data[8:length])
        begin, end = (length + at for at in header["tree"]["data_offsets"])
        return cls(header, data[length:begin], json.loads(data[begin:end]))

    def whole(self) -> bytes:
        """With a checksum that is right."""
        said, at = text(self.tree), len(self.tensors)
        header = {**self.header, "tree": {"dtype": "U8", "shape": [len(said)], "data_offsets": [at, at + len(said)]},
                  "sha256": {"dtype": "U8", "shape": [SUM_BYTES], "data_offsets": [at + len(said), at + len(said) + SUM_BYTES]}}  # fmt: skip
        return signed(header, self.tensors + said)


def signed(header: Any, data: bytes) -> bytes:
    head = text(header)
    out = struct.pack("<Q", len(head)) + head + data
    return out + hashlib.sha256(out).digest()


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree of lists and dicts: what holds it, and its key."""
    each = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, inner in each:
        yield tree, key
        yield from places(inner)


def changed(rng: Random, tree: Any) -> Any:
    """A tree with a few places that are others: odd values, other parts of the tree, one more or less, or nothing."""
    out = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        every = list(places(out))
        if not every:
            return out
        holder, key = rng.choice(every)
        now = holder[key]
        match rng.randrange(5):
            case 0:
                holder[key] = value(rng)
            case 1:
                other, place = rng.choice(every)
                holder[key] = copy.deepcopy(other[place])
            case 2 if isinstance(now, int):
                holder[key] = now + rng.choice((1, -1, 7, 2**31, 2**62, -(2**63)))
            case 3:
                del holder[key]
            case 4 if isinstance(now, list):
                holder[key] = now * 2
    return out


def reshaped(rng: Random, header: dict[str, Any]) -> dict[str, Any]:
    """A header in which one tensor is of another shape or type, of as many bytes."""
    out = copy.deepcopy(header)
    entry = out[rng.choice([name for name in out if name.isdigit()])]
    entry["shape"] = rng.choice((entry["shape"][::-1], [*entry["shape"], 1], [-(-entry["data_offsets"][1] // 4)], [0, 2**40], value(rng)))
    entry["dtype"] = rng.choice((entry["dtype"], {"F32": "I32", "I32": "F32", "F64": "I64"}.get(entry["dtype"], "U8")))
    return out


def overwritten(rng: Random, header: dict[str, Any], tensors: bytes) -> bytes:
    """One tensor, or a part of it, of other numbers: NaN, infinite, huge, negative, or any."""
    begin, end = header[rng.choice([name for name in header if name.isdigit()])]["data_offsets"]
    pattern = rng.choice((b"\xff", b"\x00", b"\x7f", b"\x00\x00\x80\x7f", rng.randbytes(4)))
    begin += rng.choice((0, (end - begin) // 8 * 4))
    return tensors[:begin] + (pattern * (end - begin))[: end - begin] + tensors[end:]


def hostile(rng: Random, data: bytes) -> bytes:
    """A state that is damaged, or crafted: with other values or tensors under a checksum that is right."""
    parts, kind = Parts.of(data), rng.randrange(10)
    match kind:
        case 0:
            return damaged(rng, data)
        case 1:
            return signed(damaged(rng, text(parts.header)).decode("utf-8", "replace"), parts.tensors)
        case 2:
            parts.header = reshaped(rng, parts.header)
        case 3:
            parts.header["__metadata__"] = {**parts.header["__metadata__"], "metadata": json.dumps(value(rng))}
        case 4:
            said = json.loads(parts.header["__metadata__"]["metadata"])
            parts.header["__metadata__"]["metadata"] = json.dumps(changed(rng, said))
        case 5 | 6:
            parts.tensors = overwritten(rng, parts.header, parts.tensors)
        case _:
            parts.tree = changed(rng, parts.tree)
    return parts.whole()


class HostileStates:
    """`of`: calls that have to be answered, for a folder in which a hostile state lies beside other files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.setups = setups()
        self.saved = [one.saved(folder, one.evaluations - 1) for one in self.setups]
        self.early = [one.saved(folder, one.evaluations * 2 // 3) for one in self.setups]

    def of(self, rng: Random, folder: Path) -> Iterator[Callable[[], object]]:
        number = rng.randrange(len(self.setups))
        setup, (name, data) = self.setups[number], rng.choice((self.saved, self.early))[number]
        path, other = folder / name, folder / "0123456789abcdef.safetensors"
        path.write_bytes(hostile(rng, data))
        if rng.random() < 0.1:
            other.symlink_to(rng.choice((name, other.name, "nowhere", "..")))
        yield lambda: metadata_of(path)
        yield lambda: read_state(path)
        whole = rng.random() < WHOLE
        yield lambda: resumed(setup, folder, None if whole else OnlyResumed())


class OnlyResumed(NoObserver):
    """Stops a run that begins anew before its first evaluation."""

    def begin(self, report: RunReport, notes: Iterable[str]) -> None:
        check_notes(report)
        if not any(note.startswith("goes on") for note in notes):
            raise Stopped


def check_notes(report: RunReport) -> list[str]:
    """Those of a state that is not used."""
    notes = [note for note in report.notes if "state of this film was saved, but" in note]
    assert all(note.isprintable() and len(note) < NOTE for note in notes)
    return notes


def resumed(setup: Setup, folder: Path, observer: Observer | None) -> None:
    """The run is resumed and its film made or refused; where the state is not used, the film is that of a run in one go, unless it is stopped."""
    with suppress(Stopped):
        check_film(setup, *setup.make(folder, every=LONG, observer=observer))


def check_film(setup: Setup, film: Tensor, report: RunReport) -> None:
    if check_notes(report) or not any("goes on" in note for note in report.notes):
        assert torch.equal(film, setup.whole)
    assert film.shape == setup.noise.shape
    assert torch.isfinite(film).all()
    assert all((json.dumps(report.as_dict()), report.text(), report.summary()))

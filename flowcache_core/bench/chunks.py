"""The figure `scale-chunks`: devices that each have some of the active chunks of a row, beside devices that share the heads of one chunk after the
other, by the arithmetic of `ranks/cost.py`. Nothing is run, and sharing of chunks is not built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..ranks.cost import Machine, Mesh, Row, Work, sent_bytes
from .cards import GIB, ways
from .geometries import GEOMETRIES, Geometry, Sized
from .measured import table
from .model import MIB
from .scale import LINKS, MODELS, meshes_of, work_of

SECONDS = 60
"""Of the film."""
COUNTS = (2, 4, 8)


@dataclass(frozen=True)
class FilmRows:
    """The rows of a film, and how often each is run; clean passes are left out. `fullest`: one with as many chunks and slots as any."""

    work: Work
    rows: dict[Row, int]

    @classmethod
    def of(cls, geometry: Geometry) -> FilmRows:
        """A minute, with chunks as closely behind each other as the model allows."""
        work, job = work_of(geometry), replace(geometry.job, frames=geometry.frames_of(SECONDS), ar_step=next(iter(ways(geometry))))
        schedule, by_step = job.schedule(Sized.of(geometry)), work.evaluations
        rows = Counter[Row]()
        for row in schedule.rows:
            seen = [(chunk.index - schedule.oldest(chunk.index) + 1) * work.tokens for chunk in row.active]
            of_step = [by_step[chunk.step] if work.steps else work for chunk in row.active]
            each = tuple(replace(one, seen=min(one.seen, most)) for one, most in zip(of_step, seen, strict=True))
            first = min(chunk.index - one.seen // one.tokens + 1 for chunk, one in zip(row.active, each, strict=True))
            rows[Row(each, (row.active[0].index - first) * work.tokens)] += 1
        return cls(work, dict(rows))

    @property
    def fullest(self) -> Row:
        return max(self.rows, key=lambda row: (len(row.each), row.slots))

    def fastest(self, count: int, seconds: Callable[[Row, Mesh], float]) -> tuple[float, Mesh]:
        """Seconds on so many devices, and the mesh that takes the least; `seconds`: of a row."""
        each = [(sum(times * seconds(row, mesh) for row, times in self.rows.items()), mesh) for mesh in meshes_of(self.work, count)]
        return min(each, key=lambda one: one[0])

    def by_heads(self, count: int, machine: Machine) -> tuple[float, Mesh]:
        return self.fastest(count, lambda row, mesh: row.by_heads(mesh, machine))

    def by_chunks(self, count: int, machine: Machine, whole: bool) -> tuple[float, Mesh]:
        """Where the devices along heads have chunks instead."""
        return self.fastest(count, lambda row, mesh: row.by_chunks(mesh, machine, whole))


def chunks() -> str:
    """How many times as fast as one card a film is, and what each card sends in a full row and keeps, over PCIe."""
    lines = []
    for name in MODELS:
        film = FilmRows.of(GEOMETRIES[name])
        row, alone = film.fullest, {link: film.by_heads(1, machine)[0] for link, machine in LINKS.items()}
        for count in COUNTS:
            heads = {link: film.by_heads(count, machine) for link, machine in LINKS.items()}
            by_chunk = {(link, whole): film.by_chunks(count, LINKS[link], whole) for link in LINKS for whole in (True, False)}
            speeds = [f"{alone[link] / seconds:.2f}x" for link, (seconds, _) in heads.items()]
            speeds += [f"{alone[link] / by_chunk[link, whole][0]:.2f}x" for whole in (True, False) for link in LINKS]
            mesh, others = heads["PCIe"][1], [(by_chunk["PCIe", whole][1], whole) for whole in (True, False)]
            sent = [sum(sent_bytes(one, mesh) for one in row.each), *(row.chunk_bytes(one, whole) for one, whole in others)]
            kept = [row.cache(mesh.branches) / mesh.heads, *(row.chunk_cache(one, whole) for one, whole in others)]
            size, memory = (", ".join(f"{value / unit:.{digits}f}" for value in values) for values, unit, digits in ((sent, MIB, 0), (kept, GIB, 1)))
            lines.append((name, count, len(row.each), *speeds, size, memory))
    ours = [f"{what}, {link}" for what in ("heads", "chunks, history whole", "chunks, history shared") for link in LINKS]
    return table(["model", "cards", "chunks at once", *ours, "each sends in a full row, MiB", "KV cache of each, GiB"], lines)


FIGURES: dict[str, Callable[[], str]] = {"scale-chunks": chunks}

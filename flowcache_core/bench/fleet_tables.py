"""The figures of fleets in docs/scale.md, of one-minute films at 960 x 544: arithmetic and simulation, nothing measured."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from statistics import fmean

from .cards import GIB
from .film_cost import Production, Worker
from .fleet import HOUR, Division
from .geometries import GEOMETRIES
from .measured import table
from .model import UNCACHED
from .scale import CARDS, LINKS, MODELS

BALANCED, QUARTER = "balanced", "balanced, kv-quarter"
MINUTE = 60
THOUSAND = 1000
SEEDS = 10
"""Of workers that are lost; tables have the mean."""
NVLINK = LINKS["NVLink"]
CARD = 80
"""GiB."""


@cache
def production(model: str, arm: str) -> Production:
    return Production(model, arm, GEOMETRIES[model].frames_of(MINUTE))


def worker(model: str, arm: str, cards: int = 1) -> Worker:
    return Worker.of(production(model, arm), cards, NVLINK)


@cache
def division(model: str, films: int, gpus: int, cards: int) -> Division:
    """`balanced`; no worker is lost, and no state saved."""
    return Division((production(model, BALANCED),), films, gpus, cards, NVLINK)


def cost() -> str:
    """GPU hours of a thousand films, one card each: in the network by what is computed, in the decoder, and in states after every chunk."""
    lines = []
    for model in MODELS:
        one = worker(model, UNCACHED)
        network = (f"{sum(worker(model, arm).chunks) * THOUSAND / HOUR:.0f}" for arm in (UNCACHED, BALANCED, QUARTER))
        saves = (f"{(each.film(1).seconds - each.seconds) * THOUSAND / HOUR:.0f}" for each in (one, worker(model, QUARTER)))
        lines.append((model, *network, f"{one.production.decoding * THOUSAND / HOUR:.0f}", *saves))
    return table(["model", "network, uncached", BALANCED, QUARTER, "decoded and encoded", "a state after every chunk", "the same, a quarter"], lines)


def one_film() -> str:
    """Minutes of one film, decoding included, and how many times as fast as on one card."""
    lines = []
    for model in MODELS:
        for arm in (UNCACHED, BALANCED):
            cells = []
            for cards in CARDS:
                each = [Worker.of(production(model, arm), cards, machine).seconds for machine in LINKS.values()]
                alone = worker(model, arm).seconds
                cells.append(" / ".join(f"{seconds / 60:.1f} ({alone / seconds:.1f}x)" for seconds in each))
            lines.append((model, arm, *cells))
    return table(["model", "film", *(f"{cards} card{'s' * (cards > 1)}: minutes, {' / '.join(LINKS)}" for cards in CARDS)], lines)


def eight() -> str:
    """How eight cards are best divided among so many films, and the hours until the last is there; of divisions whose cards hold it."""
    counts = (1, 2, 3, 4, 6, 8, 9, 12, 100)
    lines = []
    for model in MODELS:
        ways = [division(model, films, 8, cards) for films in counts for cards in CARDS]
        fitting = [one for one in ways if one.fits(CARD)]
        best = [min((one for one in fitting if one.films == films), key=lambda one: round(one.simulated.seconds)) for films in counts]
        lines.append((model, *(f"{8 // one.cards} x {one.cards}: {one.hours:.2f} h" for one in best)))
    return table(["model", *(f"{films} film{'s' * (films > 1)}" for films in counts)], lines)


def many() -> str:
    """Hours and GPU hours of a thousand films on so many workers."""
    lines = []
    for model, workers in product(MODELS, (10, 100, THOUSAND)):
        ways = (division(model, THOUSAND, workers * cards, cards) for cards in CARDS)
        lines.append((model, f"{workers:,}", *(_many(one) for one in ways)))
    return table(["model", "workers", *(f"of {cards} card{'s' * (cards > 1)}" for cards in CARDS)], lines)


def _many(one: Division) -> str:
    if not one.fits(CARD):
        return f"{one.held:.0f} GiB do not fit"
    return f"{one.hours:.2f} h, {one.gpu_hours:,.0f} GPU h"


def mixed() -> str:
    """60 films of SkyReels-V2 of 15, 60 and 180 seconds in turn on eight cards."""
    lines = []
    for model, first in product(MODELS[:2], (False, True)):
        each = tuple(Production(model, BALANCED, GEOMETRIES[model].frames_of(seconds)) for seconds in (15, MINUTE, 180))
        ways = (Division(each, 60, 8, cards, NVLINK, longest_first=first) for cards in CARDS)
        cells = (f"{one.hours:.2f} h, {one.idle:.0%}" if one.fits(CARD) else f"{one.held:.0f} GiB do not fit" for one in ways)
        lines.append((model, "longest first" if first else "in turn", *cells))
    return table(["model", "order", *(f"{8 // cards} x {cards}: until done, idle" for cards in CARDS)], lines)


def lost() -> str:
    """GPU hours of a thousand films by how often states are saved and cards are lost; of these, lost and idle."""
    one, cards = production("skyreels-14b", BALANCED), 2
    rates = {"never": 0.0, "after 1,000 h": 1e3, "after 100 h": 100.0, "after 24 h": 24.0}
    lines = []
    for every in (0, 36, 12, 4, 1):
        ways = ([Division((one,), THOUSAND, 200, cards, NVLINK, every, rate, seed) for seed in range(SEEDS)] for rate in rates.values())
        lines.append((every or "never", *(_lost(each) for each in ways)))
    return table(["a state after so many chunks", *(f"a card is lost {rate}" for rate in rates)], lines)


def _lost(ways: list[Division]) -> str:
    hours, gone, idle = (fmean(one) for one in zip(*((one.gpu_hours, one.lost_hours, one.idle * one.gpu_hours) for one in ways), strict=True))
    return f"{hours:.0f} ({gone:.0f}, {idle:.0f})"


def fitting() -> str:
    """The worker that holds the model on cards of this size and takes the fewest GPU hours for a thousand films."""
    lines = []
    for size in (24, 48, CARD):
        for model in MODELS:
            each = [(arm, cards, sharded) for arm in (BALANCED, QUARTER) for cards in CARDS for sharded in (False, True) if cards > 1 or not sharded]
            ways = [Worker.of(production(model, arm), cards, NVLINK, sharded) for arm, cards, sharded in each]
            cells = []
            for arm in (BALANCED, QUARTER):
                fits = [one for one in ways if one.production.arm == arm and one.fits(size)]
                cells.append(_cheapest(fits) if fits else f"none: {min(one.held for one in ways if one.production.arm == arm) / GIB:.0f} GiB with 8")
            lines.append((f"{size} GiB", model, *cells))
    return table(["cards", "model", f"{BALANCED}: cards of a worker, GiB on each, GPU hours", f"{QUARTER}: the same"], lines)


def _cheapest(ways: list[Worker]) -> str:
    one = min(ways, key=lambda one: one.seconds * one.mesh.devices)
    weights = ", weights shared" if one.sharded else ""
    return f"{one.mesh.devices}, {one.held / GIB:.1f}, {one.seconds * one.mesh.devices * THOUSAND / HOUR:.0f}{weights}"


FIGURES: dict[str, Callable[[], str]] = {
    "fleet-cost": cost, "fleet-one": one_film, "fleet-eight": eight, "fleet-many": many, "fleet-mixed": mixed, "fleet-lost": lost,
    "fleet-fits": fitting,
}  # fmt: skip

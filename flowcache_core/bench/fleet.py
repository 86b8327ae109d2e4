"""`bench fleet`: how long films take on a fleet that is not here, by the cost model: cards for one film against films side by side.

Nothing runs but a simulation of `render` (`fleet/simulation.py`), with the seconds of a film as `film_cost.py` has them.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice
from typing import Any

from ..fleet.simulation import Fleet, Simulated, simulate
from ..ranks.cost import Machine
from .cards import CARDS as SIZES
from .cards import GIB
from .film_cost import Production, Worker, arms
from .geometries import GEOMETRIES
from .scale import CARDS, LINKS, MODELS

NAME = "fleet"
HOUR = 3600.0
MOST = 100_000
"""Films and cards that are simulated."""
LONGEST = 3600.0
"""Seconds of a film."""


@dataclass(frozen=True)
class Division:
    """Films on `gpus` cards, `cards` of which make a worker. `productions`: what is made, in turn; `save_every`: finished chunks, 0 never;
    `lost_after`: hours of work after which a card is lost on average, 0 never; `longest_first`: in which order they are made; `sharded`: whether
    the cards of a worker share the weights too."""

    productions: tuple[Production, ...]
    films: int
    gpus: int
    cards: int
    machine: Machine
    save_every: int = 0
    lost_after: float = 0.0
    seed: int = 0
    longest_first: bool = False
    sharded: bool = False

    @cached_property
    def workers(self) -> list[Worker]:
        """One for each production. Raises ValueError where so many cards cannot share a film."""
        return [Worker.of(one, self.cards, self.machine, self.sharded) for one in self.productions]

    @cached_property
    def simulated(self) -> Simulated:
        each = [worker.film(self.save_every) for worker in self.workers]
        films = list(islice(cycle(each), self.films))
        if self.longest_first:
            films.sort(key=lambda film: -film.seconds)
        lifetime = self.lost_after * HOUR / self.cards if self.lost_after else math.inf
        load, resume = self.workers[0].load, max(worker.resume for worker in self.workers)
        return simulate(films, Fleet(self.gpus // self.cards, load, resume, lifetime), self.seed)

    @property
    def hours(self) -> float:
        return self.simulated.seconds / HOUR

    @property
    def gpu_hours(self) -> float:
        """Of all cards until the last film is there."""
        return self.hours * (self.gpus // self.cards) * self.cards

    @property
    def efficiency(self) -> float:
        """GPU hours that these films take on single cards that do nothing else, over those that they take here."""
        least = [Worker.of(one, 1, self.machine).seconds for one in self.productions]
        return sum(islice(cycle(least), self.films)) / HOUR / self.gpu_hours

    @property
    def saving_hours(self) -> float:
        """GPU hours in which states are written, of films that are not lost."""
        each = [worker.film(self.save_every).seconds - worker.seconds for worker in self.workers]
        return sum(islice(cycle(each), self.films)) * self.cards / HOUR

    @property
    def lost_hours(self) -> float:
        """GPU hours of work lost with workers, and of loading and reading again."""
        return self.simulated.spent.lost * self.cards / HOUR

    @property
    def idle(self) -> float:
        """The part of all hours in which workers had no film."""
        return self.simulated.idle / self.simulated.seconds / (self.gpus // self.cards)

    def fits(self, card: float) -> bool:
        return all(worker.fits(card) for worker in self.workers)

    @property
    def held(self) -> float:
        """GiB on the card that holds most."""
        return max(worker.held for worker in self.workers) / GIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="whose sizes the films have (default %(default)s)")
    parser.add_argument("--arm", default="balanced", help="how they are made, by its name in bench model (default %(default)s)")
    parser.add_argument("--films", type=int, default=1000, help="how many (default %(default)s)")
    parser.add_argument("--seconds", default="60", help="length of a film at 960 x 544; several, separated by commas, in turn (default %(default)s)")
    parser.add_argument("--gpus", type=int, default=8, help="cards in all (default %(default)s)")
    parser.add_argument("--card", type=float, default=80.0, metavar="GIB", help="memory of a card (default %(default)g)")
    parser.add_argument("--link", choices=tuple(LINKS), default="NVLink", help="between the cards of a worker (default %(default)s)")
    parser.add_argument("--save-every", type=int, default=1, help="a state after so many finished chunks, 0 never (default %(default)s)")
    parser.add_argument("--lost-after", type=float, default=1000.0, metavar="HOURS",
                        help="of work, on average, until a card is lost, and its worker with it; 0 never (default %(default)g)")  # fmt: skip
    parser.add_argument("--longest-first", action="store_true", help="make the longest films first (default: in the order of --seconds)")
    parser.add_argument("--price", type=float, default=0.0, help="of a GPU hour, in any currency (default: none is shown)")
    parser.add_argument("--seed", type=int, default=0, help="which workers are lost (default %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows"}: for workers of 1, 2, 4 and 8 cards, see `row`. Raises ValueError for what cannot work."""
    productions = asked(args)
    rows = []
    for cards in (one for one in CARDS if one <= args.gpus):
        division = Division(productions, args.films, args.gpus, cards, LINKS[args.link], args.save_every, args.lost_after, args.seed,
                            args.longest_first)  # fmt: skip
        if cards > 1 and not division.fits(args.card):
            division = replace(division, sharded=True)
        rows.append(row(division, args.card, args.price))
    if not any(one["fits"] for one in rows):
        raise ValueError(_too_small(args, min(one["gib_a_card"] for one in rows)))
    return {"model": args.model, "arm": args.arm, "films": args.films, "seconds": args.seconds, "link": args.link, "save_every": args.save_every,
            "lost_after": args.lost_after, "rows": rows}  # fmt: skip


def row(division: Division, card: float, price: float) -> dict[str, Any]:
    """`weights`: shared where they do not fit whole; `film_minutes`: of the first length, without states; hours but `hours` are of cards: `idle_h` of
    workers without a film, `saving_h` of states, `lost_h` of work lost with workers, and of loading and reading again."""
    cards, worker = division.cards, division.workers[0]
    values = {
        "cards": cards, "workers": division.gpus // cards, "branches": worker.mesh.branches, "heads": worker.mesh.heads,
        "weights": "shared" if division.sharded else "whole", "gib_a_card": round(division.held, 1), "fits": division.fits(card),
        "film_minutes": round(worker.seconds / 60, 1),
        "hours": round(division.hours, 2), "gpu_hours": round(division.gpu_hours, 1), "efficiency": round(division.efficiency, 3),
        "idle_h": round(division.idle * division.gpu_hours, 1), "saving_h": round(division.saving_hours, 1),
        "lost_h": round(division.lost_hours, 1), "failed": division.simulated.failed,
    }  # fmt: skip
    return values | ({"price": round(division.gpu_hours * price, 2)} if price else {})


def asked(args: argparse.Namespace) -> tuple[Production, ...]:
    """Raises ValueError, before anything is simulated."""
    for name in ("films", "gpus"):
        if not 1 <= getattr(args, name) <= MOST:
            raise ValueError(f"--{name} is {getattr(args, name)}: use 1 to {MOST}")
    for name in ("save_every", "lost_after", "price"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: use 0 or more")
    if args.arm not in (known := arms(args.model)):
        raise ValueError(f"{args.model} has no arm {args.arm!r} whose steps are known before the run: choose from {'; '.join(known)}")
    geometry = GEOMETRIES[args.model]
    return tuple(Production(args.model, args.arm, geometry.frames_of(seconds)) for seconds in _seconds(args.seconds))


def _seconds(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seconds is {text!r}: write numbers, separated by commas") from None
    if wrong := [one for one in found if not 0 < one <= LONGEST]:
        raise ValueError(f"a film of {wrong[0]:g} s was asked for: use more than 0 and at most {LONGEST:g}")
    return found


def _too_small(args: argparse.Namespace, least: float) -> str:
    enough = next((f"cards of {size} GiB" for size in SIZES if least + 1 <= size), "larger cards")
    return (
        f"{args.model} as {args.arm} takes {least:.1f} GiB on each card at the least, and a card has {args.card:g}: use {enough}, or an arm that "
        f"keeps less history ({'; '.join(arms(args.model))})"
    )

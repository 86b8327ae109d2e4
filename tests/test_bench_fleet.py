"""`bench fleet`: what films of released models take on cards that are not there, and which cards hold them."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from flowcache_core.bench import fleet
from flowcache_core.bench.cards import GIB, card, evaluation, held
from flowcache_core.bench.film_cost import DECODED, DISK, PICTURE, Production, Worker, arms, work
from flowcache_core.bench.fleet import Division
from flowcache_core.bench.fleet_tables import production
from flowcache_core.bench.geometries import GEOMETRIES
from flowcache_core.bench.model import arms_of, counter
from flowcache_core.bench.rendered import one_killed
from flowcache_core.bench.scale import LINKS
from flowcache_core.fleet.simulation import FilmTime
from flowcache_core.models.magi_family import MAGI_DISTILLED
from flowcache_core.models.magi_vae import MagiVAE
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.models.wan_vae import WanVAE

NVLINK = LINKS["NVLink"]
SHORT = Production("skyreels-1.3b", "balanced", GEOMETRIES["skyreels-1.3b"].frames_of(5))


def asked(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    fleet.add_arguments(parser)
    return fleet.run(parser.parse_args(["--seconds", "5", *arguments]))


def test_a_card_holds_what_one_device_announces_and_shares_its_history() -> None:
    """One card: as `gpu-memory` has it. Four, 2 x 2: a quarter of the KV cache and of an evaluation, and all weights."""
    geometry = GEOMETRIES["skyreels-14b"]
    frames = geometry.frames_of(5)
    whole, moment = held(geometry, frames, arms_of(geometry.family)["balanced"], 50), evaluation(geometry)
    one, four = (Worker.of(Production("skyreels-14b", "balanced", frames), cards, NVLINK) for cards in (1, 4))
    assert one.held == whole.weights + whole.held + moment
    assert four.held == pytest.approx(whole.weights + whole.held - 3 / 4 * whole.kv + moment / 4)
    for size in (48, 80, 141):
        assert one.fits(size) == (card(one.held) in [f"{fit} GiB" for fit in (12, 16, 24, 32, 48, 80, 141) if fit <= size])


def test_shared_weights_are_on_all_cards_together_once_but_for_a_layer() -> None:
    """14B, 40 layers: an eighth of them, one layer that is gathered and PyTorch's buffer for it; and they are sent in every evaluation."""
    film = Production("skyreels-14b", "balanced", GEOMETRIES["skyreels-14b"].frames_of(5))
    whole, shared = (Worker.of(film, 8, NVLINK, sharded) for sharded in (False, True))
    layers = work("skyreels-14b").network.stored * 2
    assert 0.9 * whole.weights < layers < whole.weights
    assert whole.held - shared.held == pytest.approx(layers * (1 - 1 / 8 - 2 / 40))
    evaluations = sum(sum(one.values()) for one in film.evaluations)
    assert sum(shared.chunks) - sum(whole.chunks) == pytest.approx(evaluations * (layers * 7 / 8 / NVLINK.link + 40 * NVLINK.latency), rel=1e-6)


def test_weights_are_shared_where_they_do_not_fit_whole() -> None:
    rows = asked("--films", "9", "--model", "skyreels-14b", "--card", "24")["rows"]
    assert [(one["cards"], one["weights"], one["fits"]) for one in rows] == [
        (1, "whole", False), (2, "shared", False), (4, "shared", False), (8, "shared", True)]  # fmt: skip


def test_a_state_is_the_history_of_the_next_chunk() -> None:
    """1.3B, two branches, 30 layers of 1536 channels: at most four chunks of five latent frames of 2040 tokens, fewer at the start."""
    token = 2 * 30 * 1536 * 2 * 2
    assert SHORT.states[0] == SHORT.schedule.span(0)[1] * 2040 * token
    assert max(production("skyreels-1.3b", "balanced").states) == 20 * 2040 * token
    assert max(production("skyreels-1.3b", "balanced, kv-quarter").states) == pytest.approx(6.25 * 2040 * token)


def test_states_cost_their_bytes_and_part_the_film() -> None:
    worker = Worker.of(SHORT, 1, NVLINK)
    chunks = SHORT.schedule.chunks
    whole, each, second = (worker.film(every) for every in (0, 1, 2))
    assert [len(film.parts) for film in (whole, each, second)] == [1, chunks, math.ceil(chunks / 2)]
    assert whole.seconds == pytest.approx(worker.seconds)
    assert each.seconds - whole.seconds == pytest.approx(sum(SHORT.states) / DISK)
    assert second.seconds - whole.seconds == pytest.approx(sum(SHORT.states[1::2]) / DISK)


def test_the_network_of_a_distilled_model_runs_the_branches_that_it_needs() -> None:
    """MAGI-1: one branch, in the last stage two, the second of which sees its chunk alone; ranges of 5, 4, 3 and 2 chunks."""
    film = Production("magi-4.5b", "uncached", GEOMETRIES["magi-4.5b"].frames_of(15))
    chunk = 6 * 2040
    last = film.evaluations[-2]
    assert {(one.branches, one.seen / chunk): times for one, times in last.items()} == {(1, 5): 16, (1, 4): 16, (1, 3): 16, (2, 1.5): 16, (1, 1): 1}


def test_a_history_under_a_budget_is_seen_as_far_as_it_is_kept() -> None:
    """A quarter of five chunks, and the chunk itself."""
    geometry = GEOMETRIES["skyreels-1.3b"]
    last = Production("skyreels-1.3b", "kv-quarter", geometry.frames_of(20)).evaluations[-1]
    assert {one.seen for one in last} == {round((5 + 1.25 * 5) * 2040)}


def test_decoders_take_the_operations_that_are_counted() -> None:
    """Wan: the second latent frame of a film, and all after it. MAGI-1: one tile of three latent frames, of which 3 x 5 cover the picture."""
    with torch.device("meta"), torch.inference_mode():
        wan = [operations(WanVAE(), torch.randn(1, 16, frames, 68, 120)) for frames in (1, 2)]
        magi = operations(MagiVAE(), torch.randn(1, 16, 3, 32, 32))
    assert wan[1] - wan[0] == pytest.approx(DECODED[SKYREELS.name], rel=1e-3)
    assert 3 * 5 * magi / 3 == pytest.approx(DECODED[MAGI_DISTILLED.name], rel=1e-3)
    assert PICTURE == 8 * 68 * 8 * 120


def operations(vae: Any, latents: torch.Tensor) -> float:
    with counter() as counted:
        vae.decode(latents)
    return float(counted.get_total_flops())


def test_gpu_hours_are_those_of_all_cards_and_no_more_are_useful() -> None:
    for cards in (1, 2, 4, 8):
        one = Division((SHORT,), 40, 16, cards, NVLINK, save_every=1, lost_after=1.0)
        worker, came = one.workers[0], one.simulated
        assert one.gpu_hours == 16 * one.hours
        assert came.spent.useful == pytest.approx(40 * worker.film(1).seconds)
        assert (came.spent.busy + came.idle) * cards / 3600 == pytest.approx(one.gpu_hours)
        assert 0 < one.efficiency < 1
        assert one.lost_hours > 0


def test_films_of_several_lengths_take_turns_and_the_longest_may_go_first() -> None:
    longer = Production(SHORT.model, SHORT.arm, GEOMETRIES[SHORT.model].frames_of(15))
    turns = Division((SHORT, longer), 9, 4, 1, NVLINK)
    assert turns.simulated.spent.useful == pytest.approx(5 * turns.workers[0].seconds + 4 * turns.workers[1].seconds)
    assert replace(turns, longest_first=True).hours <= turns.hours


def test_the_command_prints_a_row_for_every_way_and_the_price_of_its_hours() -> None:
    rows = asked("--films", "20", "--gpus", "7", "--price", "3")["rows"]
    assert [(one["cards"], one["workers"]) for one in rows] == [(1, 7), (2, 3), (4, 1)]
    assert all(one["price"] == pytest.approx(3 * one["gpu_hours"], abs=0.2) and one["fits"] for one in rows)
    assert rows[0]["gib_a_card"] == pytest.approx(Worker.of(SHORT, 1, NVLINK).held / GIB, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--films", "0"), "--films is 0: use 1 to 100000"),
        (("--gpus", "-3"), "--gpus is -3: use 1 to 100000"),
        (("--lost-after", "-1"), "--lost-after is -1.0: use 0 or more"),
        (("--price", "nan"), "--price is nan: use 0 or more"),
        (("--seconds", "a"), "--seconds is 'a': write numbers, separated by commas"),
        (("--seconds", "60,0"), "a film of 0 s was asked for: use more than 0 and at most 3600"),
        (("--arm", "motion"), "has no arm 'motion' whose steps are known before the run: choose from uncached; safe; balanced"),
        (
            ("--model", "skyreels-14b", "--card", "12"),
            r"takes 15\.\d GiB on each card at the least, and a card has 12: use cards of 24 GiB, or an arm",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(arguments: tuple[str, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        asked(*arguments)


def test_arms_are_those_whose_steps_are_known() -> None:
    assert arms("skyreels-1.3b") == arms("magi-24b") == ["uncached", "safe", "balanced", "fast", "turbo", "kv-quarter", "balanced, kv-quarter"]


def test_one_killed_worker_costs_its_part_and_its_loading() -> None:
    """Two films of 4 + 1 seconds by two workers; the first is lost after 2.5, with two states saved. The other one takes its film when its own is
    done, at 5, and the new worker at 2.5 + 1: it goes on for 2 + 1 seconds."""
    films = [FilmTime((1.0,) * 4, 1.0)] * 2
    assert one_killed(films, 2.5, 1.0) == pytest.approx(6.5)
    assert one_killed(films, 2.5, 4.0) == pytest.approx(8.0)

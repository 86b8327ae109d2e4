"""One film over several devices: it is the film of one, each holds and sends its share, and all of them end when one does."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flowcache_core.bench import scale
from flowcache_core.bench.geometries import GEOMETRIES
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.policy import KVPolicy, SharedKVPolicy
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.kv.scores.even import Even
from flowcache_core.kv.scores.salience import Salience
from flowcache_core.memory import RunMemory
from flowcache_core.models.magi_family import MAGI
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.policies import Motion
from flowcache_core.policies.protocol import PartPolicy, PlanPolicy, TokenPolicy
from flowcache_core.ranks.cost import Machine, Mesh, Network, Row, Step, Work, fastest, kept_bytes, meshes, ratio, seconds, sent_bytes
from flowcache_core.ranks.group import shares
from flowcache_core.ranks.launch import add_arguments, all_together, sharded, world
from flowcache_core.ranks.world import ONE, Spread, World, shares_branches, wants_residual
from flowcache_core.run.generate import generate
from tests.rank_cases import CASES, JOB, MACHINE, SOME, TOKENS, Case, bundle_of
from tests.test_kv_scores import random_view

SENTENCE = "flowcache: device {} of {} stops: "


@pytest.fixture(scope="module")
def came(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of all cases and all ends, by one process and its forks."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.rank_cases", f"{folder}"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


SHARED = [(f"{devices}", name) for devices, names in SOME.items() for name in names]
EACH = pytest.mark.parametrize(("devices", "name"), SHARED)


@EACH
def test_a_film_that_devices_share_is_the_film_of_one(came: dict[str, Any], devices: str, name: str) -> None:
    for device in came["films"][devices]:
        case = CASES.get(name)
        assert device[name]["deviation"] <= (1e-5 if case and case.dtype == "float32" else 1e-12)
        assert device[name]["same"]


@EACH
def test_no_device_holds_more_than_its_share_of_the_cache(came: dict[str, Any], devices: str, name: str) -> None:
    case = CASES.get(name, CASES["uncached"])
    for rank, device in enumerate(each[name] for each in came["films"][devices]):
        branches, heads = place_of(device, rank)
        mesh, cached = device["devices"], 2 if case.job.cfg != 1 and not by_token(case) else branches_of(case)
        mine = shares(case.heads, mesh["heads"])[heads] * shares(cached, mesh["branches"])[branches]
        assert device["kv"] * cached * case.heads == device["kv_alone"] * mine


def place_of(device: dict[str, Any], rank: int) -> tuple[int, int]:
    return divmod(rank, device["devices"]["heads"])


def branches_of(case: Case) -> int:
    return 1 if case.job.cfg == 1 else 3 if case.family == MAGI.name else 2


def by_token(case: Case) -> bool:
    return isinstance(case.policy, TokenPolicy | PartPolicy)


@pytest.mark.parametrize("name", ["motion", "motion by output", "motion by change", "part", "magi motion", "magi part"])
def test_some_evaluations_of_these_cases_are_of_some_tokens(came: dict[str, Any], name: str) -> None:
    tokens = came["films"]["2"][0][name]["tokens"]
    assert {0, tokens_of(CASES[name])} < set(tokens)


NET = Network(2, 512, 4, 4, 128, 1, 64)
"""Of the cases of SkyReels-V2."""
HISTORY = (1, 2)
"""Chunks whose slots are scored when the first and the second chunk join history."""


MAGI_NET, MAGI_TOKENS = Network(2, 256, 4, 8, 32, 1, 64), 24
"""The same of MAGI-1, and tokens of its chunks."""
NO_FORMULA = ("prefix", "seconds")
"""Another first chunk, evaluations that are only timed."""
COUNTED = [(devices, name) for devices, name in SHARED if name not in NO_FORMULA]


@pytest.mark.parametrize(("devices", "name"), COUNTED)
def test_bytes_are_those_of_the_formula(came: dict[str, Any], devices: str, name: str) -> None:
    for rank, device in enumerate(each[name] for each in came["films"][devices]):
        found, case = device["devices"], CASES.get(name, CASES["uncached"])
        mesh, place, itemsize = Mesh(found["branches"], found["heads"]), place_of(device, rank), torch.finfo(getattr(torch, case.dtype)).bits // 8
        net = replace(NET, width=128 * case.heads, heads=case.heads, query_heads=case.heads) if case.family == SKYREELS.name else MAGI_NET
        chunk = tokens_of(case)
        work = Work(net, branches_of(case), chunk, 0, 0, itemsize, residual=wants_residual(case.policy))
        at = [(step % case.job.steps, tokens) for step, tokens in enumerate(device["tokens"])]
        asked = [(step, tokens) for step, tokens in at if tokens or not isinstance(case.policy, PlanPolicy)]
        ran = [replace(work, tokens=tokens, chunk_tokens=chunk, branches=run_at(case, step)) for step, tokens in asked]
        commit = replace(work, branches=min(2, work.branches), committing=True)
        expected = sum(sent_bytes(one, mesh, place) for one in (*ran, *[commit] * device["commits"]))
        if case.compressor or name == "kv salience":
            expected += sum(kept_bytes(commit, mesh, place, count * chunk, name == "kv salience") for count in HISTORY)
        assert found["bytes"] == expected


def tokens_of(case: Case) -> int:
    return MAGI_TOKENS if case.family == MAGI.name else TOKENS


def run_at(case: Case, step: int) -> int:
    """Branches at a step: of MAGI-1 one less in the last quarter, unless tokens wait."""
    less = case.family == MAGI.name and 4 * step >= 3 * case.job.steps and not isinstance(case.policy, PartPolicy)
    return branches_of(case) - less


SHARDED = pytest.mark.parametrize(("devices", "name"), [(devices, name) for devices, name in SHARED if name in CASES and CASES[name].sharded])


@SHARDED
def test_no_device_holds_more_weights_than_its_share_and_one_layer(came: dict[str, Any], devices: str, name: str) -> None:
    for weights in (each[name]["weights"] for each in came["films"][devices]):
        assert weights["after"] <= 1.01 * weights["whole"] / int(devices)
        assert weights["after"] < weights["most"] <= weights["after"] + weights["layer"]


@SHARDED
def test_weights_are_sent_as_often_as_the_parts_of_the_network_are_called(came: dict[str, Any], devices: str, name: str) -> None:
    for device in (each[name] for each in came["films"][devices]):
        assert device["devices"]["weights"]["bytes"] == device["weights"]["sent"]


@pytest.mark.parametrize("name", ["killed", "stopped", "interrupted"])
def test_all_devices_end_with_a_sentence_when_one_ends(came: dict[str, Any], name: str) -> None:
    end = came["ends"][name]
    assert end["seconds"] < 10
    assert 0 not in end["statuses"]
    assert not end["files"]
    devices = len(end["texts"])
    for rank, (text, status) in enumerate(zip(end["texts"], end["statuses"], strict=True)):
        if status in (1, 143):
            assert SENTENCE.format(rank + 1, devices) in text
        else:
            assert status in (-9, 130)
        assert "Traceback" not in text


def test_a_film_that_devices_share_goes_on_from_the_state_of_each(came: dict[str, Any]) -> None:
    for one in (each["as it was"] for each in came["states"]):
        assert len({name.split(".")[0] for name in one["files"]}) == 1
        assert [name.split(".")[1:] for name in one["files"]] == [["0", "safetensors"], ["1", "safetensors"]]
        assert any("goes on from a saved state: 1 of 3 chunks" in note for note in one["notes"])
        assert one["deviation"] == 0
        assert not one["left"]


def test_a_state_of_another_mesh_is_named_and_stays(came: dict[str, Any]) -> None:
    for one in (each["other mesh"] for each in came["states"]):
        assert any('devices: "2 x 1" there, "1 x 2" here' in note for note in one["notes"])
        assert one["deviation"] == pytest.approx(0, abs=1e-12)
        assert one["left"]


def test_a_film_begins_anew_where_one_device_has_lost_its_state(came: dict[str, Any]) -> None:
    for one in (each["lost"] for each in came["states"]):
        assert any("not by all of its devices, or not at the same row: the film begins anew" in note for note in one["notes"])
        assert one["deviation"] == 0


def test_no_device_keeps_a_state_that_another_cannot_write(came: dict[str, Any]) -> None:
    whys = "another device of this film cannot write its part", "No space left on device"
    for why, one in zip(whys, (each["full disk"] for each in came["states"]), strict=True):
        assert any(f"cannot be saved ({why})" in note for note in one["notes"])
        assert one["saves"] == 0
        assert one["deviation"] == 0


def test_the_bench_has_a_row_for_one_device_and_for_every_way_of_all(came: dict[str, Any]) -> None:
    rows = came["scale"]["rows"]
    assert [(row["devices"], row["branches"], row["heads"]) for row in rows] == [(1, 1, 1), (2, 1, 2), (2, 2, 1)]
    assert all(row["seconds"] > 0 and row["expected"] > 0 for row in rows)
    assert [row["kv_mib"] * row["devices"] for row in rows] == [rows[0]["kv_mib"]] * 3
    assert came["scale"]["others"] == ""


def test_weights_that_a_device_has_no_room_for_are_shared(came: dict[str, Any]) -> None:
    alone, *shared = came["scale"]["rows"]
    assert alone["weights_mib_per_evaluation"] == 0
    assert all(row["weights_mib_per_evaluation"] > 0 for row in shared)


def test_weights_stay_whole_on_one_device_and_a_memory_of_nothing_is_refused() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    network = torch.nn.Linear(1, 1)
    assert sharded(ONE, network, "", parser.parse_args(["--fsdp", "on"])) is ONE
    with pytest.raises(ValueError, match="--device-memory is in GiB and more than 0, and 0 was given"):
        sharded(ONE, network, "", parser.parse_args(["--device-memory", "0"]))


# how a film is shared


@pytest.mark.parametrize("kind", [kind for kind in KV_POLICIES if kind is not Salience], ids=lambda kind: kind.name)
def test_scores_of_the_heads_of_two_devices_are_those_of_one(kind: type[KVPolicy]) -> None:
    view = random_view(heads=4)

    def scores(heads: slice) -> torch.Tensor:
        mine = replace(view, keys=view.keys[:, heads], values=view.values[:, heads], queries=view.queries[:, heads], memory=RunMemory())
        return kind().score(mine)

    whole, one = scores(slice(0, 4)), scores(slice(2, 3))
    if isinstance(kind(), SharedKVPolicy):
        assert torch.equal(whole, one)
    else:
        assert torch.equal(torch.cat([scores(slice(0, 1)), scores(slice(1, 4))], 1), whole)


def test_devices_that_cannot_share_a_film_are_refused_with_the_numbers_that_work() -> None:
    with pytest.raises(ValueError, match=r"8 devices cannot share this film: .* 3 heads .* use 2, 3, 4, 6 devices"):
        meshes(8, 2, 3)
    assert meshes(4, 2, 3) == [Mesh(2, 2)]
    assert meshes(6, 2, 12) == [Mesh(1, 6), Mesh(2, 3)]


def test_a_chunk_with_fewer_tokens_than_devices_is_refused() -> None:
    bundle, job = bundle_of(SKYREELS.name, "float32"), replace(JOB, size=16, width=16, cfg=1.0)
    with pytest.raises(ValueError, match="the shortest chunk has 5 tokens, which run at least 1 at a time, and 4 devices"):
        generate(bundle, job, Motion(), world=World(4, 0, MACHINE))


def test_a_budget_in_bytes_is_as_many_slots_on_devices_with_more_and_fewer_heads() -> None:
    bundle = bundle_of(SKYREELS.name, "float32", 3)
    schedule, found = JOB.schedule(bundle), []
    for rank, heads in enumerate(shares(3, 2)):
        adapter, spread = bundle.adapter(), Spread(heads=SimpleNamespace(size=2, rank=rank))  # type: ignore[arg-type]
        vars(adapter)["heads"] = heads
        mine = spread.compressor(Compressor(Even(), 0.001, "GiB"), 3)
        assert mine
        found.append(mine.budget_for(adapter, schedule, (4, 4), 24, 2, 4).slots)
    assert found[0] == found[1] == int(0.001 * 2**30 / (2 * 2 * 2 * 128 * 4 * 2))


def test_branches_stay_together_where_a_policy_looks_at_one_of_them() -> None:
    assert shares_branches(Motion())
    assert not shares_branches(Motion(measure="output"))
    assert not shares_branches(Motion(measure="change"))


def test_one_process_is_one_device() -> None:
    with world() as devices:
        assert devices is ONE


# what it costs


def test_shares_are_as_even_as_whole_numbers_are() -> None:
    assert shares(12, 8) == [2, 2, 2, 2, 1, 1, 1, 1]
    assert all(sum(shares(count, devices)) == count for count in range(20) for devices in range(1, 9))


FILM = Work(Network(30, 1536, 12, 12, 128, 10**9, 64), 2, 10200, 51000, 512, 2)


def test_what_is_expected_follows_from_the_machine() -> None:
    fast, slow = Machine(4e14, 4e14, 3e12, 3e11, 2e-5), Machine(4e14, 4e14, 3e12, 1e9, 2e-5)
    assert 1.9 < ratio(FILM, Mesh(2, 1), fast) <= 2
    assert ratio(FILM, Mesh(1, 2), slow) < ratio(FILM, Mesh(1, 2), fast)
    assert fastest(FILM, meshes(4, 2, 12), slow) == Mesh(2, 2)
    assert sent_bytes(FILM, Mesh()) == 0


def test_steps_that_run_fewer_branches_count_with_their_own_time() -> None:
    machine = Machine(1e12, 1e12, 1e12, 1e15, 0.0)
    three = Work(Network(1, 1, 1, 1, 1, 10**9, 1), 3, 1000, 0, 0, 2, remembered=2)
    steps = replace(three, steps=(Step(3, 0), Step(3, 0), Step(3, 0), Step(2, 0), Step(2, 0, committing=True)))
    each = [sum(seconds(replace(three, branches=branches), Mesh(2, 1), machine)) for branches in (3, 3, 3, 2)]
    assert sum(seconds(steps, Mesh(2, 1), machine)) == pytest.approx((sum(each) + each[-1]) / 5, rel=1e-6)
    assert ratio(steps, Mesh(2, 1), machine) == pytest.approx(13 / 8, rel=1e-3)
    assert ratio(steps, Mesh(3, 1), machine) == pytest.approx(13 / 5, rel=1e-3)
    assert sent_bytes(steps.evaluations[3], Mesh(3, 1), (2, 0)) == sent_bytes(steps.evaluations[4], Mesh(3, 1)) == 0


ALIKE = Row((FILM,) * 4, 2 * FILM.tokens)
KEYS = 2 * 30 * 2 * 12 * 128 * 2
"""Bytes of the keys and values of a token of `FILM`, both branches."""
VELOCITIES = 2 * FILM.tokens * 2 * 64 * 2
"""Of two chunks."""


def test_chunks_of_a_row_send_keys_and_values_to_later_ones_alone() -> None:
    dealt = ALIKE.dealt(2)
    assert sorted(map(sorted, dealt)) == [[0, 2], [1, 3]]
    assert ALIKE.chunk_bytes(Mesh(1, 2), whole=True) == 2 * FILM.tokens * KEYS + VELOCITIES
    assert ALIKE.chunk_bytes(Mesh(1, 2), whole=False) == 3 * FILM.tokens * KEYS + VELOCITIES
    assert ALIKE.chunk_cache(Mesh(1, 2), whole=True) == 6 * FILM.tokens * KEYS
    assert ALIKE.chunk_cache(Mesh(1, 2), whole=False) == 5 * FILM.tokens * KEYS


def test_more_devices_than_chunks_are_no_faster() -> None:
    machine = Machine(4e14, 4e14, 3e12, 3e11, 0.0)
    four, eight = (ALIKE.by_chunks(Mesh(1, devices), machine, whole=True) for devices in (4, 8))
    assert four == pytest.approx(eight, rel=1e-2)
    assert 3.5 < ALIKE.by_heads(Mesh(), machine) / four < 4


@pytest.mark.parametrize("name", scale.MODELS)
def test_more_cards_are_faster_and_hold_less_by_the_arithmetic(name: str) -> None:
    geometry, link = GEOMETRIES[name], scale.LINKS["NVLink"]
    work = scale.work_of(geometry)
    each = [fastest(work, scale.meshes_of(work, count), link) for count in scale.CARDS]
    ratios = [ratio(work, mesh, link) for mesh in each]
    assert all(0.9 * count < got <= count for count, got in zip(scale.CARDS, ratios, strict=True))
    held = [scale.cache_bytes(work, mesh) for mesh in each]
    assert held == [held[0] // count for count in scale.CARDS]


def test_operations_of_a_released_model_are_those_of_its_shapes() -> None:
    """Per token of a block of 1.3B: 6 d^2 + 2 d x ffn."""
    d, ffn = 1536, 8960
    work = scale.work_of(GEOMETRIES["skyreels-1.3b"])
    assert work.network.weights == pytest.approx(30 * (6 * d * d + 2 * d * ffn), rel=1e-3)


def test_what_one_device_sends_by_heads_falls_with_their_number() -> None:
    sizes = [sent_bytes(FILM, Mesh(1, devices)) for devices in (2, 4, 6, 12)]
    assert sizes == sorted(sizes, reverse=True)


def test_processes_wait_for_each_other_where_cards_have_a_backend_of_their_own() -> None:
    """The barrier that names who is missing is gloo's alone, and refuses a group of two backends."""
    dist.init_process_group("cpu:gloo,cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="GLOO"):
            dist.monitored_barrier()
        all_together()
    finally:
        dist.destroy_process_group()

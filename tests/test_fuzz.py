"""A thousand damaged inputs of every kind, always the same; `python -m tests.fuzz` makes more. What it once found has its own case below."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from flowcache_core.bench.frontier import Kept
from flowcache_core.models.magi_text import ROWS, read_special_tokens
from flowcache_core.policies.named import policy_named
from flowcache_core.run.remembered import fits
from flowcache_core.run.states import States
from flowcache_core.run.turn import Evaluate
from flowcache_core.sampling.loop import LoopState
from flowcache_core.sampling.plan import Plan
from flowcache_core.sampling.schedule import ChunkSchedule
from tests.fuzz import KINDS, OPENED, Inputs, one, special_tokens
from tests.fuzz_states import LONG, Parts, Setup

INPUTS = 1000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz").resolve()


@pytest.fixture(scope="module")
def inputs(base: Path) -> Inputs:
    return Inputs(base)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_inputs_succeed_or_are_refused_with_a_sentence(kind: str, inputs: Inputs, base: Path) -> None:
    succeeded = sum(one(inputs, base, kind, 1, number) for number in range(INPUTS))
    assert succeeded > 0, "some are whole, so that what comes after reading is met too"


def test_what_is_opened_outside_a_folder_is_noticed(base: Path) -> None:
    folder = base / "inside"
    folder.mkdir()
    (base / "elsewhere").touch()
    with pytest.raises(AssertionError, match="opened"), OPENED.only(folder, base):
        (base / "elsewhere").read_bytes()


def test_a_state_that_is_whole_is_used(inputs: Inputs, tmp_path: Path) -> None:
    for setup, (name, data) in zip(inputs.states.setups, inputs.states.saved, strict=True):
        tmp_path.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(Parts.of(data).whole())
        film, report = setup.make(tmp_path, every=LONG)
        assert any(note.startswith("goes on from a saved state") for note in report.notes)
        assert torch.equal(film, setup.whole)


# what was found


def refused(setup: Setup, name: str, parts: Parts, folder: Path) -> str:
    """What is said of a state that is not used, and the film is made all the same."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(parts.whole())
    film, report = setup.make(folder, every=LONG)
    assert torch.equal(film, setup.whole)
    (said,) = [note for note in report.notes if "cannot be used" in note]
    return said


def test_a_state_whose_values_are_of_other_types_is_not_used(inputs: Inputs, tmp_path: Path) -> None:
    """Each had the right checksum, and ended the run later with an error of Python."""
    for way, value in ((("session", "state", "edges"), {"dict": [[0, 1]]}),
                       (("session", "_kv", "keeper"), 5), (("session", "_kv", "_written"), [])):  # fmt: skip
        name, data = inputs.states.saved[0]
        parts = Parts.of(data)
        *path, last = way
        holder = parts.tree
        for key in path:
            holder = holder[key]["fields"]
        holder[last] = value
        assert "it does not fit this run" in refused(inputs.states.setups[0], name, parts, tmp_path)


def test_a_state_that_lacks_a_chunk_is_not_used(inputs: Inputs, tmp_path: Path) -> None:
    name, data = inputs.states.saved[0]
    parts = Parts.of(data)
    parts.tree["loop"]["fields"]["walk_of"] = {"dict": []}
    assert "it does not say how chunk 3 goes on" in refused(inputs.states.setups[0], name, parts, tmp_path)


def test_a_state_without_its_loop_is_not_used(inputs: Inputs, tmp_path: Path) -> None:
    name, data = inputs.states.saved[0]
    parts = Parts.of(data)
    del parts.tree["loop"]
    assert "it does not say where in the film it stands" in refused(inputs.states.setups[0], name, parts, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("plans", {"tuple": [7]}), ("notes", {"tuple": [7]}), ("clock", {"object": "Clock", "fields": {"spent": {"dict": [["network", "x"]]}}})],
    ids=["plans", "notes", "clock"],
)
def test_a_state_whose_report_cannot_be_read_is_not_used(name: str, value: Any, inputs: Inputs, tmp_path: Path) -> None:
    state, data = inputs.states.saved[0]
    parts = Parts.of(data)
    parts.tree["session"]["fields"]["report"]["fields"][name] = value
    assert "it does not fit this run" in refused(inputs.states.setups[0], state, parts, tmp_path)


@pytest.fixture
def resumed(inputs: Inputs, tmp_path: Path) -> Callable[..., object]:
    """A run that goes on from its state, with another evaluation of the network or other tensors in the state."""

    def make(evaluate: Evaluate | None = None, number: float | None = None) -> object:
        setup, (name, data) = inputs.states.setups[0], inputs.states.saved[0]
        parts = Parts.of(data)
        if number is not None:
            begin, end = parts.header[str(parts.tree["loop"]["fields"]["moved"]["tensor"])]["data_offsets"]
            parts.tensors = parts.tensors[:begin] + struct.pack("<f", number) * ((end - begin) // 4) + parts.tensors[end:]
        (tmp_path / name).write_bytes(parts.whole())
        own: Evaluate = lambda turn, x: turn.denoise(x, setup.text, ("cond",))  # noqa: E731
        return setup.run.sample(setup.noise.clone(), evaluate or own, states=States(tmp_path, LONG))

    return make


def test_a_resumed_run_that_fails_names_its_state_and_leaves_it(resumed: Callable[..., object], tmp_path: Path) -> None:
    for error in (RuntimeError("shapes"), KeyError("x"), TypeError("x"), ValueError("x"), AssertionError()):
        with pytest.raises(ValueError, match=r"went on from the saved state [0-9a-f]{16}\.safetensors and failed .*remove that file") as found:
            resumed(lambda turn, x, error=error: (_ for _ in ()).throw(error))
        assert found.value.__cause__ is error
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("full"), MemoryError(), OSError(28, "full")], ids=repr)
def test_what_no_state_leads_to_is_raised_as_it_is(error: BaseException, resumed: Callable[..., object]) -> None:
    with pytest.raises(type(error)) as found:
        resumed(lambda turn, x: (_ for _ in ()).throw(error))
    assert found.value is error


def test_a_film_of_a_state_that_is_no_numbers_does_not_end_in_success(resumed: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="its latents hold NaN or infinity"):
        resumed(number=math.nan)


def test_latents_of_another_size_do_not_take_the_place_of_a_film() -> None:
    state = LoopState(torch.zeros(1, 16, 4, 2, 2), torch.Generator())
    with pytest.raises(ValueError, match=r"latents of \(1, 1, 2, 1, 1\) for a film of \(1, 16, 4, 2, 2\)"):
        state.moved = torch.ones(1, 1, 2, 1, 1)


def test_other_slots_than_those_of_the_layout_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    name, data = inputs.states.saved[0]
    parts = Parts.of(data)
    spans = parts.tree["session"]["fields"]["_kv"]["fields"]["layout"]["fields"]["spans"]["dict"]
    spans[-1][1]["tuple"][1] -= 1
    assert "other slots than this run" in refused(inputs.states.setups[0], name, parts, tmp_path)


def test_a_plan_that_lists_too_few_chunks_in_part_is_refused() -> None:
    with pytest.raises(ValueError, match="a list per chunk"):
        Plan(3, ((0, 1, 2),) * 3, partial=((),)).check(ChunkSchedule(9, 3, 3, 3))


def test_a_state_with_a_plan_of_another_run_is_not_used(inputs: Inputs, tmp_path: Path) -> None:
    name, data = inputs.states.saved[1]
    parts = Parts.of(data)
    parts.tree["session"]["fields"]["plan"]["fields"]["computed"] = {"tuple": [{"tuple": [0, 7]}]}
    assert "the plan is for 1 chunks of 3 steps" in refused(inputs.states.setups[1], name, parts, tmp_path)


def test_values_are_held_against_types_as_annotations_write_them() -> None:
    assert fits([(1, 2.5)], list[tuple[int, float]])
    assert fits({"a": None}, dict[str, int | None])
    assert fits((1, 2, 3), tuple[int, ...])
    assert fits(frozenset({1}), frozenset[int])
    for value, kind in (
        ([1], list[str]),
        ((1,), tuple[int, int]),
        (True, int),
        (True, float),
        ({1: 2}, dict[str, int]),
        (1, Literal["a"]),
        (2, str | None),
        (3, frozenset[int]),
        (frozenset("a"), frozenset[int]),
    ):
        assert not fits(value, kind)


def test_special_tokens_of_the_least_whole_number_are_refused(tmp_path: Path) -> None:
    """Its absolute value overflows, and stays negative."""
    (tmp_path / "tokens.npz").write_bytes(special_tokens(other_tokens=np.full((ROWS, 2), -(2**31), np.int32)))
    with pytest.raises(ValueError, match="other_tokens has values that are no numbers or too large"):
        read_special_tokens(tmp_path / "tokens.npz")


def test_films_of_a_bench_that_are_no_text_are_made_again(tmp_path: Path) -> None:
    path = tmp_path / "films.jsonl"
    path.write_bytes(b"\xff\xfe\n{\n")
    assert not Kept(path, "float32").films


def test_films_of_a_bench_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "films.jsonl"
    for line in ("[]", "5", '{"made_by": 1}', '{"film": {}}'):
        path.write_text(line)
        if line == '{"made_by": 1}':
            assert not Kept(path, "float32").films
            continue
        with pytest.raises(ValueError, match="is not what this bench writes"):
            Kept(path, "float32")


def test_a_long_value_does_not_fill_the_sentence() -> None:
    for text in ("order=" + "9" * 5000, "x" * 5000, "x" * 5000 + "=1"):
        with pytest.raises(ValueError, match=r"9\.\.\.|x\.\.\.") as refused:
            policy_named("threshold", text)
        assert len(str(refused.value)) < 500

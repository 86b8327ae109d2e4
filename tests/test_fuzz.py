"""A thousand damaged inputs of every kind, always the same; `python -m tests.fuzz` makes more. What it once found has its own case below."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowcache_core.bench.frontier import Kept
from flowcache_core.policies.named import policy_named
from tests.fuzz import KINDS, OPENED, Inputs, one

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
    with pytest.raises(AssertionError, match="opened"), OPENED.only(folder, base):
        (base / "out.safetensors").read_bytes()


# what was found


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

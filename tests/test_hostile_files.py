"""Files from outside never hurt their neighbours: a model loads, or one sentence says what is wrong with which file, and soon."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flowcache_core.kv.scores.salience import BUNDLED, HeadInfo, SalienceHead
from flowcache_core.models.checkpoint import load_network_file, recognise
from flowcache_core.models.shards import Checkpoint, open_checkpoint, read
from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from flowcache_core.sampling.plan import Plan, read_plan

SOON_S = 5.0
FUZZED_S = 5.0
INDEX = "model.safetensors.index.json"
DEEP = "[" * 200_000
BAD_INDICES = {
    "null": '{"weight_map": null}',
    "list": '{"weight_map": ["good.safetensors"]}',
    "number": "5",
    "no map": "{}",
    "empty": "",
    "empty map": '{"weight_map": {}}',
    "deep": DEEP,
    "deep inside": '{"weight_map": {"x": "good.safetensors"}, "metadata": ' + DEEP,
    "many digits": '{"weight_map": ' + "9" * 5000 + "}",
    "numbers as names": '{"weight_map": {"x": 5}}',
    "no text": "\udcff\udcfe",
    "null byte": '{"weight_map": {"x": "good\\u0000.safetensors"}}',
    "half a letter": '{"weight_map": {"x": "\\ud800.safetensors"}}',
    "long name": json.dumps({"weight_map": {"x": "x" * 5000 + ".safetensors"}}),
    "above": '{"weight_map": {"x": "../x.safetensors"}}',
    "absolute": '{"weight_map": {"x": "/x.safetensors"}}',
    "other system": '{"weight_map": {"x": "C:\\\\x.safetensors"}}',
    "below": '{"weight_map": {"x": "more/x.safetensors"}}',
    "another kind": '{"weight_map": {"x": "x.pth"}}',
}
NAMES = (
    "model-00001-of-1000000",
    "model-0000001-of-1000000",
    "model-00000-of-00000",
    "model-1-of-" + "9" * 200,
    "m-\u0663-of-\u0665",
    "model-00009-of-00003",
)


def save(path: Path, key: str = "x") -> Path:
    save_file({key: torch.zeros(2)}, path)
    return path


def bad(index: Path, text: str) -> None:
    index.write_bytes(text.encode(errors="surrogateescape"))


@contextmanager
def soon(most: float = SOON_S) -> Iterator[None]:
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < most


def refusal(call: Callable[[], object], folder: Path | None = None) -> str:
    """The sentence with which it is refused: one line, short, without the way to the folder."""
    with pytest.raises(ValueError, match=r"[a-z]{2,} [a-z]{2,}") as refused:
        call()
    assert type(refused.value) is ValueError
    said = str(refused.value)
    assert said.isprintable()
    assert len(said) < 1000
    assert folder is None or str(folder) not in said
    return said


def answer(call: Callable[[], object], folder: Path | None = None) -> None:
    """Succeeds or is refused, and soon."""
    with soon(FUZZED_S):
        try:
            call()
        except ValueError:
            pass
        else:
            return
    refusal(call, folder)


# neighbours


@pytest.mark.parametrize("kind", BAD_INDICES)
def test_a_bad_index_leaves_the_model_beside_it_alone(tmp_path: Path, kind: str) -> None:
    good = save(tmp_path / "good.safetensors")
    bad(tmp_path / INDEX, BAD_INDICES[kind])
    for path in (good, tmp_path):
        with soon():
            assert open_checkpoint(path).files == (good,)


@pytest.mark.parametrize("kind", ["folder", "dangling", "loop", "fifo", "large"])
def test_an_index_that_is_no_file_leaves_the_model_beside_it_alone(tmp_path: Path, kind: str) -> None:
    good = save(tmp_path / "good.safetensors")
    make_index(tmp_path / INDEX, kind)
    with soon():
        assert open_checkpoint(good).files == (good,)


def make_index(index: Path, kind: str) -> None:
    if kind == "folder":
        index.mkdir()
    elif kind == "fifo":
        os.mkfifo(index)
    elif kind == "large":
        with index.open("wb") as file:
            file.truncate((16 << 20) + 1)
    else:
        index.symlink_to("nowhere" if kind == "dangling" else index.name)


def test_an_index_that_is_wrong_about_a_file_leaves_it_alone(tmp_path: Path) -> None:
    good = save(tmp_path / "good.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"y": good.name, "z": "gone.safetensors"}}))
    assert open_checkpoint(good).files == (good,)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_beside_a_model_takes_it_with_it_or_takes_long(tmp_path: Path, name: str) -> None:
    good, other = save(tmp_path / "good.safetensors"), save(tmp_path / f"{name}.safetensors", "y")
    for path in (good, other, tmp_path):
        with soon():
            answer(lambda path=path: open_checkpoint(path), tmp_path)  # type: ignore[misc]
    assert open_checkpoint(good).files == (good,)


@pytest.mark.parametrize("name", ["model-00000-of-00000", "model-00009-of-00003"])
def test_a_file_that_its_own_number_leaves_out_is_read_by_itself(tmp_path: Path, name: str) -> None:
    for number in (1, 2, 3):
        save(tmp_path / f"model-{number:05d}-of-00003.safetensors", f"x{number}")
    odd = save(tmp_path / f"{name}.safetensors")
    assert open_checkpoint(odd).files == (odd,)


def test_of_a_million_shards_the_first_that_are_missing_are_named(tmp_path: Path) -> None:
    first = save(tmp_path / "model-0000001-of-1000000.safetensors")
    with soon():
        said = refusal(lambda: open_checkpoint(first), tmp_path)
    assert re.match(r"999999 of 1000000 shards are not in \S+: model-0000002-of-1000000.safetensors, .*, \.\.\.; download", said)


def test_a_set_of_shards_goes_by_its_own_index_only(tmp_path: Path) -> None:
    files = tuple(save(tmp_path / f"model-{number:05d}-of-00002.safetensors", f"x{number}") for number in (1, 2))
    (tmp_path / "other.safetensors.index.json").write_text("{")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00009.safetensors"}}))
    assert open_checkpoint(files[1]).files == open_checkpoint(tmp_path).files == files


def test_a_folder_with_the_name_of_a_model_is_none(tmp_path: Path) -> None:
    good = save(tmp_path / "good.safetensors")
    (tmp_path / "more.safetensors").mkdir()
    assert open_checkpoint(tmp_path).files == (good,)


# an index that is needed


@pytest.mark.parametrize("kind", BAD_INDICES)
def test_an_index_that_is_needed_and_bad_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "a.safetensors"), save(tmp_path / "b.safetensors")
    bad(tmp_path / INDEX, BAD_INDICES[kind])
    with soon():
        said = refusal(lambda: open_checkpoint(tmp_path), tmp_path)
    assert said.startswith(f"{INDEX} ")
    assert said.endswith("download it again, or remove it if the shards are numbered ...-of-00012")


@pytest.mark.parametrize(
    ("kind", "why"), [("folder", "no file"), ("dangling", "no file"), ("loop", "no file"), ("fifo", "no file"), ("large", "16777217 bytes")]
)
def test_numbered_shards_with_an_index_that_is_no_file_are_refused_with_its_name(tmp_path: Path, kind: str, why: str) -> None:
    shard = save(tmp_path / "model-00001-of-00001.safetensors")
    make_index(tmp_path / INDEX, kind)
    for path in (shard, tmp_path):
        with soon():
            assert re.match(rf"{INDEX} cannot be read: it (is|has) {why}", refusal(lambda path=path: open_checkpoint(path), tmp_path))  # type: ignore[misc]


def test_links_that_lie_in_the_folder_are_followed(tmp_path: Path) -> None:
    """Download caches are made of links, and people link their models; an index can name what lies in its folder, and nothing else."""
    inside, outside = tmp_path / "in", save(tmp_path / "out.safetensors")
    inside.mkdir()
    (inside / "a.safetensors").symlink_to(outside)
    save(inside / "b.safetensors", "y")
    (inside / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    for path in (inside, inside / "b.safetensors"):
        assert set(open_checkpoint(path).stored) == {"x", "y"}


def test_an_index_of_very_many_files_is_answered_soon(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {f"{n}": f"{n}.safetensors" for n in range(10_000)}}))
    with soon():
        assert "10000 of 10000 shards are not in" in refusal(lambda: open_checkpoint(tmp_path), tmp_path)


# headers


def with_header(path: Path, header: bytes, data: bytes = bytes(8), length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(shape: list[int], end: int = 8, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize("length", [11, 99_999_999, 2**63, 2**64 - 1])
def test_a_header_beyond_the_end_of_its_file_is_refused_with_both_lengths(tmp_path: Path, length: int) -> None:
    path = with_header(tmp_path / "net.safetensors", b"{}", length=length)
    for call in (read, open_checkpoint, SalienceHead.load):
        said = refusal(lambda call=call: call(path), tmp_path)  # type: ignore[misc]
        assert re.match(rf"net.safetensors \(18 bytes\) .* its header should be {length} bytes long, and only 10 follow; download it again", said)


def test_a_header_of_many_megabytes_is_refused(tmp_path: Path) -> None:
    path = with_header(tmp_path / "net.safetensors", b"{}", length=40 << 20)
    with path.open("ab") as file:
        file.truncate(50 << 20)
    with soon():
        assert "its header is 41943040 bytes long, and at most 33554432 are read" in refusal(lambda: open_checkpoint(path), tmp_path)


@pytest.mark.parametrize("shape", [[0, 2**63], [0, 2**64 - 1], [0, 2**62, 2**62], [1] * 100])
def test_shapes_that_torch_cannot_hold_are_refused_before_reading(tmp_path: Path, shape: list[int]) -> None:
    size = 4 if all(shape) else 0
    path = with_header(tmp_path / "net.safetensors", json.dumps({"x": entry(shape, size)}).encode(), bytes(size))
    for call in (read, open_checkpoint):
        assert "x has shape" in refusal(lambda call=call: call(path), tmp_path)  # type: ignore[misc]


def test_keys_of_a_file_do_not_fill_the_sentence(tmp_path: Path) -> None:
    path = with_header(tmp_path / "net.safetensors", json.dumps({"\n" * 9 + "x" * 900: entry([8], dtype="F8_E8M0")}).encode())
    assert "is stored as F8_E8M0" in refusal(lambda: open_checkpoint(path), tmp_path)
    with_header(path, json.dumps({"x" * 100_000: entry([2])}).encode())
    assert "has 100000 characters, and at most 1024 are read" in refusal(lambda: open_checkpoint(path), tmp_path)


@pytest.mark.parametrize("shape", [[8], [2, 2, 2]])
def test_a_network_of_odd_shapes_is_refused(tmp_path: Path, shape: list[int]) -> None:
    path = with_header(tmp_path / "net.safetensors", json.dumps({"patch_embedding.weight": entry(shape, 32)}).encode(), bytes(32))
    refusal(lambda: load_network_file(path), tmp_path)


@pytest.mark.parametrize("number", [10**9, 10**4000], ids=["large", "of many digits"])
def test_a_network_with_a_block_of_a_large_number_is_refused_soon(tmp_path: Path, net: SkyReelsV2, number: int) -> None:
    path = tmp_path / "net.safetensors"
    save_file({**net.state_dict(), f"blocks.{number}.modulation": torch.zeros(1, 6, 128)}, path)
    with soon(FUZZED_S):
        refusal(lambda: load_network_file(path), tmp_path)


# salience heads


@pytest.mark.parametrize(
    "change",
    [
        {"layers": "1000000000"},
        {"layers": "0"},
        {"layers": "-1"},
        {"in_dim": "-5"},
        {"in_dim": str(2**62)},
        {"hidden": "9" * 5000},
        {"hidden": "0"},
        {"block_frames": "0"},
        {"weights": "nan,0,0"},
        {"weights": "1,2," + "x" * 5000},
        {"out": "\n" * 5000},
    ],
    ids=lambda change: "-".join(f"{key}-{value[:12].strip()}" for key, value in change.items()),
)
def test_a_salience_head_of_impossible_numbers_is_refused_soon(tmp_path: Path, change: dict[str, str]) -> None:
    path = tmp_path / "head.safetensors"
    save_file(load_file(BUNDLED), path, {**SalienceHead.load(BUNDLED).info.metadata(), **change})
    with soon():
        assert refusal(lambda: SalienceHead.load(path), tmp_path).startswith("head.safetensors is ")


def test_a_salience_head_that_is_gone_is_named_without_its_folder(tmp_path: Path) -> None:
    assert "there is no salience head gone.safetensors" in refusal(lambda: SalienceHead.load(tmp_path / "gone.safetensors"), tmp_path)


# plans

PLAN = '{"format": "flowcache-plan-1", "steps": 3, "computed": [[0, 1]], %s}'


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        '{"plan": ' * 100_000,
        "9" * 5000,
        PLAN % f'"part": {10**400}',
        PLAN % '"part": NaN',
        PLAN % '"part": -1',
        PLAN % '"partial": [[1], [1]]',
        '"' + "x" * (16 << 20) + '"',
    ],
    ids=["deep", "deep plans", "digits", "large part", "no number", "negative part", "part of no chunk", "long"],
)
def test_a_hostile_plan_is_refused_soon(text: str) -> None:
    with soon():
        assert "plan" in refusal(lambda: read_plan(text))


# whatever a file holds

FUZZED = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
ODD = st.sampled_from([0, 1, -1, 2, 8, 2**31, 2**62, 2**63, 2**64, 10**30, 0.5, float("inf"), float("nan")])
NAMES_HERE = ["a.safetensors", "b.safetensors", "model-00001-of-00002.safetensors", "../a.safetensors"]
ODD_TEXT = st.sampled_from(["", "\0", "\ud800", "..", "/", "\n", *NAMES_HERE])
TEXT = ODD_TEXT | st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | ODD | TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
NAME = st.sampled_from(NAMES_HERE) | ODD_TEXT
MAP = st.dictionaries(st.sampled_from(["x", "y", "z", "\0"]), NAME | JSON, max_size=4) | JSON


def cut(text: bytes, at: float, junk: bytes) -> bytes:
    place = int(at * len(text))
    return text[:place] + junk + text[place + len(junk) :]


DAMAGE = st.tuples(st.floats(0, 1), st.binary(max_size=4))


@FUZZED
@given(values=st.fixed_dictionaries({"weight_map": MAP}) | JSON, damage=st.none() | DAMAGE)
def test_whatever_an_index_says(tmp_path_factory: pytest.TempPathFactory, values: Any, damage: tuple[float, bytes] | None) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    for name, key in (("a", "x"), ("b", "y")):
        save(folder / f"{name}.safetensors", key)
    text = json.dumps(values).encode()
    (folder / INDEX).write_bytes(cut(text, *damage) if damage else text)
    answer(lambda: open_checkpoint(folder), folder)
    answer(lambda: open_checkpoint(folder / "a.safetensors"), folder)
    shard = save(folder / "model-00001-of-00002.safetensors", "z")
    answer(lambda: open_checkpoint(shard), folder)
    shard.unlink()


SHAPE = st.lists(st.sampled_from([0, 1, 2, 4, 2**31, 2**62, 2**63, 2**64 - 1, -1]), max_size=5)
DTYPE = st.sampled_from(["F32", "BF16", "F8_E4M3", "I64", "BOOL", "U8", "F4", "F8_E8M0", "C64", "U16", "nothing"])
OFFSETS = st.lists(st.sampled_from([0, 4, 8, 16, -1, 2**63]), min_size=2, max_size=2)
SOUND = st.sampled_from([entry([2]), entry([0], 0), entry([0, 2**63], 0), entry([1, 8], dtype="F8_E8M0")])
TENSOR = st.fixed_dictionaries({"dtype": DTYPE, "shape": SHAPE, "data_offsets": OFFSETS}) | SOUND | JSON
KEYS = st.sampled_from(["patch_embedding.weight", "head.head.weight", "blocks.99999999.modulation", "a\0b", "scaled_fp8", "x"]) | st.text(max_size=6)
METADATA = st.dictionaries(st.sampled_from(["format", "architecture", "layers"]), st.text(max_size=6) | JSON, max_size=2)


@FUZZED
@given(header=st.dictionaries(KEYS, TENSOR, max_size=3), said=st.none() | METADATA, damage=st.none() | DAMAGE, data=st.sampled_from([0, 8, 16]),
       length=st.none() | st.sampled_from([0, 1, 2**20, 2**63]))  # fmt: skip
def test_whatever_a_header_says(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], said: Any, damage: tuple[float, bytes] | None,
                                data: int, length: int | None) -> None:  # fmt: skip
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    text = json.dumps(header if said is None else {"__metadata__": said, **header}).encode()
    with_header(path, cut(text, *damage) if damage else text, bytes(data), length)
    for call in (open_checkpoint, read, load_network_file, SalienceHead.load):
        answer(lambda call=call: call(path), path.parent)  # type: ignore[misc]


with torch.device("meta"):
    STATE = SkyReelsV2(SkyReelsConfig(128, 256, 1, 64)).state_dict()
ODD_KEYS = ["blocks.", "blocks.x.modulation", "blocks.7", "scaled_fp8", "condition_embedder.time_proj.weight", "blocks.0.ffn.0.weight_scale_2", "x"]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 127, 128, 256, 2**21, 2**40]), max_size=5).filter(
    lambda shape: math.prod(max(n, 1) for n in shape) < 2**48
)


@settings(FUZZED, max_examples=150)
@given(changed=st.dictionaries(st.sampled_from([*STATE, *ODD_KEYS]) | KEYS, SHAPES, max_size=3), gone=st.lists(st.sampled_from([*STATE]), max_size=2))
def test_whatever_the_shapes_of_a_network_are(changed: dict[str, list[int]], gone: list[str]) -> None:
    weights = STATE | {key: torch.empty(shape, device="meta") for key, shape in changed.items()}
    answer(lambda: recognise({key: weight for key, weight in weights.items() if key not in gone}, "net"))


INFO = HeadInfo(1, 2, 1, 3, "model", "sum", "teacher", 1, "licence").metadata()
NUMBER = st.sampled_from(["0", "1", "2", "-1", "300", "70000", "1000000000", "9" * 5000, "nan", "inf", "1,2,3", "", "\0", "\u0661"]) | st.text(
    max_size=8
)


@FUZZED
@given(change=st.dictionaries(st.sampled_from(sorted(INFO)), NUMBER, max_size=3), key=KEYS, shape=st.sampled_from([(), (1,), (2, 2), (0, 3)]))
def test_whatever_a_salience_head_says(tmp_path_factory: pytest.TempPathFactory, change: dict[str, str], key: str, shape: tuple[int, ...]) -> None:
    path = tmp_path_factory.getbasetemp() / "head.safetensors"
    save_file({key: torch.zeros(shape)}, path, {**INFO, **change})
    answer(lambda: SalienceHead.load(path), path.parent)


LISTS = st.lists(st.lists(st.integers(-1, 4) | ODD, max_size=4), max_size=3) | JSON
PLANS = st.fixed_dictionaries({"format": st.just("flowcache-plan-1"), "steps": st.integers(1, 4) | ODD, "computed": LISTS},
                              optional={"together": JSON, "partial": LISTS, "part": ODD | JSON})  # fmt: skip


@FUZZED
@given(values=PLANS | st.lists(PLANS, max_size=2) | st.fixed_dictionaries({"plan": PLANS | JSON}) | JSON, at=st.none() | st.floats(0, 1))
def test_whatever_a_plan_says(values: Any, at: float | None) -> None:
    text = json.dumps(values)
    answer(lambda: read_plan(text if at is None else text[: int(at * len(text))]))


def test_what_is_sound_is_still_read(tmp_path: Path) -> None:
    assert isinstance(open_checkpoint(save(tmp_path / "a.safetensors")), Checkpoint)
    assert isinstance(read_plan(PLAN % '"together": false'), Plan)

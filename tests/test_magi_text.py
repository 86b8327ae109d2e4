"""What MAGI-1 reads in front of a prompt, and how many tokens in all."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowcache_core.models.adapter import Call, ChunkTexts
from flowcache_core.models.magi_text import SpecialTokens, before, chunks_to_come, null_text, prompt_text, read_special_tokens
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler
from tests.driven import Driven
from tests.toy_family import ToyAdapter, toy_network

WIDTH = 8
CAPTION, LOGO = 1000, 1001
"""Every special token of these tests is a row of one number: that of its place among the others, or these."""


def arrays(width: int = WIDTH, rows: int = 100) -> dict[str, Any]:
    """Shaped as the released file."""
    numbers = np.arange(rows, dtype=np.float64)[:, None].repeat(width, 1)
    return {"caption_token": np.full((1, width), CAPTION, np.float64), "logo_token": np.full((1, width), LOGO, np.float64), "other_tokens": numbers}


@pytest.fixture(scope="module")
def special() -> SpecialTokens:
    return SpecialTokens.of(arrays(), "special_tokens.npz")


def prompt(words: int, films: int = 1) -> Tensor:
    """Rows of one number each: -1, -2, ..."""
    return -torch.arange(1.0, words + 1)[None, :, None].expand(films, words, WIDTH)


def said(text: Tensor) -> list[int]:
    """The number of every row of the first film."""
    assert (text == text[..., :1]).all()
    return [int(n) for n in text[0, :, 0]]


def chunk(index: int) -> Chunk:
    return Chunk(index, 6 * index, 6, 0, 4)


# tokens


def test_the_released_rows_have_their_published_meaning(special: SpecialTokens) -> None:
    names = ("static", "dynamic", "border", "hq", "3d", "2d")
    assert {name: said(special.front([name])[None]) for name in names} == {
        "static": [2], "dynamic": [3], "border": [4], "hq": [1], "3d": [15], "2d": [16],
    }  # fmt: skip
    assert said(special.durations[None]) == [7, 8, 9, 10, 11, 12, 13, 14]
    assert said(special.unwanted[None]) == [4, 0, LOGO, CAPTION]


@pytest.mark.parametrize(
    ("traits", "front"),
    [
        ((), []),
        (("hq",), [1]),
        (("hq", "3d"), [15, 1]),
        (("2d", "3d", "hq", "border", "dynamic", "static"), [16, 15, 1, 4, 3, 2]),
        (("static", "hq", "static"), [1, 2]),
    ],
)
def test_each_token_is_put_in_front_of_those_before(special: SpecialTokens, traits: tuple[str, ...], front: list[int]) -> None:
    """In one order, whatever that of the traits: first frames, border, quality, style; the last of them is read first."""
    assert said(prompt_text(prompt(3), special, traits)) == [*front, -1, -2, -3]


def test_a_trait_without_a_token_is_refused(special: SpecialTokens) -> None:
    with pytest.raises(ValueError, match="no token for 'slow': choose from static, dynamic, border, hq, 3d, 2d"):
        prompt_text(prompt(3), special, ("hq", "slow"))


def test_every_film_of_a_batch_gets_the_tokens_in_the_dtype_of_its_text(special: SpecialTokens) -> None:
    text = prompt_text(prompt(4, films=3).bfloat16(), special)
    assert text.dtype == torch.bfloat16
    assert [said(film[None]) for film in text] == [[1, -1, -2, -3, -4]] * 3


def test_a_text_of_another_width_is_refused(special: SpecialTokens) -> None:
    with pytest.raises(ValueError, match=r"the text has 64 channels and the special tokens of MAGI-1 8: use the text encoder T5-v1\.1-xxl"):
        prompt_text(torch.zeros(1, 3, 64), special)


# lengths


def test_padding_is_cut_off(special: SpecialTokens) -> None:
    mask = (torch.arange(256) < 3).long().expand(2, 256)
    assert said(prompt_text(prompt(256, films=2), special, mask=mask)) == [1, -1, -2, -3]
    assert said(prompt_text(prompt(256), special, (), torch.zeros(1, 256))) == []


@pytest.mark.parametrize(("traits", "most"), [((), 799), (("hq",), 798), (("hq", "2d", "static"), 796)])
def test_of_800_tokens_those_in_front_are_a_part(special: SpecialTokens, traits: tuple[str, ...], most: int) -> None:
    """Room is left for the duration."""
    text = prompt_text(prompt(most), special, traits)
    assert text.shape[1] == 799
    assert special.text_of(text, chunk(0), 1).shape[1] == 800
    sentence = rf"has {most + 7} tokens of text, with {800 - most} special ones in front 807: MAGI-1 reads at most 800, so shorten it by 7"
    with pytest.raises(ValueError, match=sentence):
        prompt_text(prompt(most + 7), special, traits)


def test_padding_does_not_count(special: SpecialTokens) -> None:
    mask = torch.arange(900)[None] < 798
    assert prompt_text(prompt(900), special, mask=mask).shape[1] == 799


def test_prompts_of_unlike_lengths_are_refused_together(special: SpecialTokens) -> None:
    mask = torch.arange(9)[None] < torch.tensor([[4], [7]])
    with pytest.raises(ValueError, match="of a batch have 4 to 7 tokens of text: make their films one by one"):
        prompt_text(prompt(9, films=2), special, mask=mask)


def test_a_mask_of_another_text_is_refused(special: SpecialTokens) -> None:
    with pytest.raises(ValueError, match="the text has 20 tokens and its mask 12, so texts were joined"):
        prompt_text(prompt(20), special, mask=torch.ones(1, 12))


@pytest.mark.parametrize("mask", [[0, 1, 1], [1, 0, 1]])
def test_padding_in_front_of_words_is_refused(special: SpecialTokens, mask: list[int]) -> None:
    with pytest.raises(ValueError, match="words behind padding"):
        prompt_text(prompt(3), special, mask=torch.tensor([mask]))


# the null caption


def test_of_the_null_caption_50_rows_are_read(special: SpecialTokens) -> None:
    learned = prompt(800)[0]
    assert said(null_text(learned)) == [-n for n in range(1, 51)]
    assert said(null_text(learned, special)) == [4, 0, LOGO, CAPTION, *(-n for n in range(1, 47))]


# durations


def test_the_duration_counts_the_chunks_to_come(special: SpecialTokens) -> None:
    assert [chunks_to_come(chunk(index), 10) for index in range(10)] == [7, 7, 7, 6, 5, 4, 3, 2, 1, 0]
    text = prompt_text(prompt(2), special)
    assert [said(special.text_of(text, chunk(index), 3)) for index in range(3)] == [[9, 1, -1, -2], [8, 1, -1, -2], [7, 1, -1, -2]]


def test_every_chunk_of_a_film_is_given_its_own_duration(special: SpecialTokens) -> None:
    """Through `ChunkTexts`; commit passes have that of their chunk."""
    given: dict[int, set[tuple[int, ...]]] = {}

    class Durations(ToyAdapter):
        def text(self, context: Tensor) -> Tensor:
            return context

        def text_of(self, text: Tensor, chunk: Chunk, chunks: int) -> Tensor:
            return special.text_of(text, chunk, chunks)

        def forward(self, call: Call, attend: Any) -> tuple[Tensor, Tensor]:
            given.setdefault(call.chunk.index, set()).add(tuple(said(call.text)))
            return torch.zeros_like(call.x), torch.zeros(1)

    adapter, schedule, levels = Durations(toy_network(WIDTH)), ChunkSchedule(18, 6, 3, 1), flow_sigmas(3)
    assert isinstance(adapter, ChunkTexts)
    context = prompt_text(prompt(2), special)
    with Session(adapter, schedule, levels, (4, 4)) as session:
        predict = Driven(lambda x, chunk: session.denoise(x, chunk, context, ("text",)), session)
        sample_chunks(predict, torch.randn(1, 16, 18, 4, 4), schedule, levels, Euler())
    assert given == {0: {(9, 1, -1, -2)}, 1: {(8, 1, -1, -2)}, 2: {(7, 1, -1, -2)}}


# the file


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_the_file_is_read_and_rounded_as_released(tmp_path: Path) -> None:
    random = {key: np.random.default_rng(1).normal(size=value.shape) for key, value in arrays(64).items()}
    special = read_special_tokens(saved(tmp_path / "special_tokens.npz", **random))
    assert special.channels == 64
    assert np.array_equal(special.others.numpy(), random["other_tokens"].astype(np.float16))
    assert np.array_equal(special.caption.numpy(), random["caption_token"][0].astype(np.float16))
    assert np.array_equal(special.logo.numpy(), random["logo_token"][0].astype(np.float16))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", ["<f8", "<f4", "<f2", ">f4", "<i4"])
def test_numbers_of_every_kind_and_order_are_read(tmp_path: Path, save: Any, kind: str) -> None:
    mine = {key: np.asfortranarray(value.astype(kind)) for key, value in arrays().items()}
    save(tmp_path / "a.npz", **mine)
    assert said(read_special_tokens(tmp_path / "a.npz").others[None]) == list(range(100))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file special_tokens\.npz"):
        read_special_tokens(tmp_path / "special_tokens.npz")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"logo_token": None}, r"\(caption_token \(1, 8\), logo_token is missing, other_tokens \(100, 8\)\)"),
        ({"other_tokens": np.zeros((16, 8))}, r"at least 17 more of the same width .*other_tokens \(16, 8\)"),
        ({"other_tokens": np.zeros((100, 9))}, "the same width"),
        ({"other_tokens": np.zeros(100)}, "the same width"),
        ({"other_tokens": np.array(None)}, "it has an array of object"),
        ({"caption_token": np.full((1, 8), np.nan)}, "damaged: caption_token has values that are no numbers or too large"),
        ({"logo_token": np.full((1, 8), 1e5)}, "damaged: logo_token"),
        ({"more": np.zeros(9 << 20)}, "it holds 4 arrays of .* bytes, and at most 16 of 67108864 are read"),
        ({f"more{n}": np.zeros(1) for n in range(14)}, "it holds 17 arrays"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    mine = {key: value for key, value in {**arrays(), **changed}.items() if value is not None}
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **mine)
    with pytest.raises(ValueError, match=why) as refused:
        read_special_tokens(path)
    assert str(refused.value).startswith("a.npz")
    assert str(refused.value).isprintable()


def header(shape: tuple[int, ...], kind: str = "<f8") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


DAMAGED = {
    "empty": b"",
    "no header": b"12345678",
    "cut": header((100, 8)) + bytes(99),
    "more": header((2, 8)) + bytes(2 * 8 * 8 + 1),
    "huge": header((1 << 40, 8)) + bytes(64),
    "negative": header((-1, 8)) + bytes(64),
    "many axes": header((1,) * 40) + bytes(8),
    "python": b"\x93NUMPY\x01\x00" + (76).to_bytes(2, "little") + b"__import__('os').getpid()".ljust(75) + b"\n",
    "brackets": b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000,
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_array_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("other_tokens.npy", DAMAGED[kind])
    with pytest.raises(ValueError, match=r"^a\.npz is not a whole file of NumPy arrays: .*; download it again$"):
        read_special_tokens(path)


def test_no_damaged_byte_hurts(tmp_path: Path) -> None:
    """Every file is read, or refused by name."""
    path, rng = tmp_path / "a.npz", np.random.default_rng(3)
    whole = saved(path, **arrays(2, 17)).read_bytes()
    answers = []
    for _ in range(300):
        broken = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 4)):
            broken[place] = rng.integers(0, 256)
        path.write_bytes(bytes(broken[: None if rng.random() < 0.7 else rng.integers(0, len(whole))]))
        answers.append(answer(path))
    assert 100 < sum(one.startswith("a.npz ") and one.isprintable() for one in answers) == len(answers) - answers.count("")


def answer(path: Path) -> str:
    """The refusal, or nothing."""
    try:
        read_special_tokens(path)
    except ValueError as error:
        return str(error)
    return ""


def test_tokens_go_in_front(special: SpecialTokens) -> None:
    assert said(before(prompt(2), special.others[5:7])) == [5, 6, -1, -2]

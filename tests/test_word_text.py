"""The text encoder without weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowcache_core.models.word_text import MAX_WORDS, encode_prompt, words_of

PROMPT = "Red circle moves left, blue square moves red"


def test_a_prompt_is_the_same_in_every_process() -> None:
    script = "from flowcache_core.models.word_text import encode_prompt as e; print(e('red circle', 8).flatten().tolist())"
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(encode_prompt("red circle", 8).flatten().tolist())


def test_a_word_knows_its_clause() -> None:
    tokens = encode_prompt(PROMPT, 64)[0]
    assert words_of(PROMPT)[0][0] == words_of(PROMPT)[1][3] == "red"
    assert not torch.allclose(tokens[0], tokens[7])


def test_the_order_of_clauses_moves_tokens_and_changes_none() -> None:
    a, b = encode_prompt("red circle, blue square", 16)[0], encode_prompt("blue square, red circle", 16)[0]
    assert torch.equal(a[:2], b[2:4])
    assert torch.equal(a[2:4], b[:2])


def test_case_and_punctuation_do_not_matter() -> None:
    assert torch.equal(encode_prompt("RED  circle. Blue square!", 16), encode_prompt("red circle, blue square", 16))


@pytest.mark.parametrize("prompt", ["", "   ", ", . ;"])
def test_the_empty_prompt_is_zeros(prompt: str) -> None:
    assert encode_prompt(prompt, 16).shape == (1, MAX_WORDS, 16)
    assert not encode_prompt(prompt, 16).any()


def test_zeros_follow_the_last_word() -> None:
    used = encode_prompt(PROMPT, 16)[0].abs().amax(-1) > 0
    assert used.tolist() == [True] * 8 + [False] * (MAX_WORDS - 8)


@pytest.mark.parametrize("prompt", ["word " * 40, "one two three, " * 20, "word " * 31 + ", two words"])
def test_at_most_32_words_are_read(prompt: str) -> None:
    assert MAX_WORDS == 32
    assert sum(map(len, words_of(prompt))) == 32
    assert encode_prompt(prompt, 8).abs().amax(-1).all()

"""A text encoder without weights: every word is a fixed random direction, blurred with the other words of its clause.

Real checkpoints use umT5; the bundled model was trained on this one, so that nothing has to be downloaded.
A clause ends at a comma. Each token is its own word plus the clause it stands in, so "red" and "left" of
"red circle moves left" can be told from those of the next clause.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import torch
from torch import Tensor

MAX_WORDS = 32


@lru_cache(maxsize=4096)
def _direction(word: str, dim: int) -> Tensor:
    """A unit-variance Gaussian vector [dim] that depends on the word only, the same on every machine."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") >> 1
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed))


def words_of(prompt: str) -> list[list[str]]:
    """Clauses of lower-case words, at most MAX_WORDS words in all."""
    clauses, room = [], MAX_WORDS
    for clause in re.split(r"[,.;\n]+", prompt.lower()):
        words = re.findall(r"[\w'-]+", clause)[:room]
        room -= len(words)
        if words:
            clauses.append(words)
    return clauses


def encode_prompt(prompt: str, dim: int) -> Tensor:
    """-> [1, MAX_WORDS, dim], zeros after the last word; the empty prompt is all zeros."""
    out = torch.zeros(1, MAX_WORDS, dim)
    at = 0
    for clause in words_of(prompt):
        whole = torch.stack([_direction("clause:" + w, dim) for w in clause]).sum(0) / 2
        for word in clause:
            out[0, at] = (_direction(word, dim) + whole) / 2**0.5
            at += 1
    return out

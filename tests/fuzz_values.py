"""Odd values and damaged bytes, from random numbers."""

from __future__ import annotations

import json
import random
from typing import Any

Random = random.Random
NUMBERS = (0, 1, -1, 2, 7, 255, 2**16, 2**31, 2**53, 2**62, 2**63, 2**64 - 1, 10**30, 0.5, 1e308, float("nan"), float("inf"))
TEXTS = ("", "x", "\0", "\ud800", "..", "/", "\n", "\u202e", "../out.safetensors", "/etc/passwd", "out.safetensors", "a.safetensors", "b.safetensors",
         "link.safetensors", "model-00001-of-00002.safetensors", "C:\\x.safetensors", "//host/x.safetensors", "x" * 300)  # fmt: skip
KEYS = ("x", "y", "weight_map", "patch_embedding.weight", "blocks.0.modulation", "head.head.weight", "__metadata__", "scaled_fp8", "plan", "format")


def value(rng: Random, depth: int = 3) -> Any:
    """Any JSON value."""
    kind = rng.randrange(8 if depth else 5)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice((*TEXTS, *KEYS))
    if kind == 4:
        return rng.choice((None, True, False))
    if kind == 5:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {rng.choice((*KEYS, *TEXTS)): value(rng, depth - 1) for _ in range(rng.randrange(4))}


def damaged(rng: Random, data: bytes) -> bytes:
    """A few bytes changed, cut out, put in or repeated; sometimes none."""
    out = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0 if at < len(out):
                out[at] = rng.randrange(256)
            case 1:
                out[at:at] = rng.randbytes(rng.randrange(9))
            case 2:
                del out[at : at + rng.choice((1, 8, 1000))]
            case 3:
                out[at:at] = out[at : at + rng.choice((1, 16, 64))]
            case _:
                del out[at:]
    return bytes(out)


def text(values: Any) -> bytes:
    return json.dumps(values).encode("utf-8", "surrogatepass")

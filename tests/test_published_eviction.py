"""Which tokens of history stay: FlowCache's compression (ICLR 2026) against its released code.

FLOWCACHE_PATH names the folder of a checkout; without it the tests are skipped. Keys stay off the GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.kv.evict import select
from flowcache_core.kv.scores.importance import ImportanceRedundancy
from tests.released import checkout, imported, module
from tests.released_rules import MAGI_FOLDER, SKYREELS_FOLDER

HEADS, SHARED_BY, CHANNELS_OF_HEAD, GRID, FRAMES = 3, 2, 16, (3, 4), 4
EACH = GRID[0] * GRID[1]
CLEAN_CHUNKS, KEPT_CHUNKS = 3, 2


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that the released code brings to a GPU stay where they are."""
    to = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda self, where, *args, **kw: self if where == "cuda" else to(self, where, *args, **kw))


def keys_and_queries(seed: int) -> tuple[Tensor, Tensor]:
    """Keys [1, H, N, D] of the clean chunks, some alike and some not, and the queries of one chunk [1, G * H, n, D]."""
    rng = torch.Generator().manual_seed(seed)
    n = CLEAN_CHUNKS * FRAMES * EACH
    alike = torch.randn(1, HEADS, 5, CHANNELS_OF_HEAD, generator=rng)[:, :, torch.randint(5, (n,), generator=rng)]
    keys = torch.rand(1, HEADS, n, 1, generator=rng) * alike + torch.randn(1, HEADS, n, CHANNELS_OF_HEAD, generator=rng)
    return keys, 2 * torch.randn(1, HEADS * SHARED_BY, FRAMES * EACH, CHANNELS_OF_HEAD, generator=rng)


def scored(keys: Tensor, queries: Tensor, asks: Any) -> Tensor:
    """[H, N] by our policy, as published but for the queries that ask."""
    view: Any = SimpleNamespace(keys=keys, queries=queries, frame_tokens=EACH, new=FRAMES * EACH)
    return ImportanceRedundancy(queries=asks).score(view)[0]


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("asks", ["chunk", "frame"])
@pytest.mark.parametrize("whole", ["token", "frame", "chunk"])
def test_the_released_compression_of_magi_keeps_the_tokens_with_our_highest_scores(asks: str, whole: str, seed: int) -> None:
    """Head by head, as there: the score is per head here too. What one layer keeps is chosen here by the mean over its heads."""
    root = checkout("FLOWCACHE_PATH", f"{MAGI_FOLDER}/inference/pipeline/flowcache.py") / MAGI_FOLDER
    stubs = {"matplotlib": module("matplotlib"), "matplotlib.pyplot": module("matplotlib.pyplot")}
    released = imported(root, "inference.pipeline.kvcompress.kv_compressor", stubs)
    keys, queries = keys_and_queries(seed)
    kept = KEPT_CHUNKS * FRAMES * EACH
    rule = released.KVCompressor(mix_lambda=0.07, compress_strategy=whole, query_granularity=asks, score_weighting_method="no_weight")
    rule.budget = kept
    by_token = keys[0].transpose(0, 1)
    indices = rule.update_kv(by_token, queries[0].transpose(0, 1), by_token, by_token.shape[0], FRAMES, *GRID)[2][:, :, 0]
    groups = torch.arange(by_token.shape[0]) // {"token": 1, "frame": EACH, "chunk": FRAMES * EACH}[whole]
    none = torch.zeros(HEADS, by_token.shape[0], dtype=torch.bool)
    ours = select(scored(keys, queries, asks), kept, none, groups.expand(HEADS, -1), int(groups[-1]) + 1)
    assert torch.equal(ours, indices.T.sort(1).values)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("seed", range(3))
def test_the_released_compression_of_skyreels_keeps_the_tokens_with_our_highest_scores(seed: int) -> None:
    root = checkout("FLOWCACHE_PATH", f"{SKYREELS_FOLDER}/generate_video_df.py") / SKYREELS_FOLDER
    released = imported(root, "skyreels_v2_infer.modules.compression.compress_kv", {})
    keys, queries = keys_and_queries(seed)
    kept = KEPT_CHUNKS * FRAMES * EACH
    by_token = keys[0].transpose(0, 1)
    indices = released.R1KV(budget=kept).update_kv_token(by_token, queries[0].transpose(0, 1), by_token, by_token.shape[0])[2][:, :, 0]
    ours = select(scored(keys, queries, "chunk"), kept, torch.zeros(HEADS, by_token.shape[0], dtype=torch.bool))
    assert torch.equal(ours, indices.T.sort(1).values)

"""Salience: what a head is taught, how it is trained and stored, and what it does as a KV policy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowcache_core.kv.cache import CachedAttention, KVCache, KVSizes
from flowcache_core.kv.policy import KVView, LearntKVPolicy, fitted
from flowcache_core.kv.scores import salience as policy
from flowcache_core.kv.scores.salience import LOW, OUT, SAME, UP, HeadInfo, Salience, SalienceHead, head_at, places
from flowcache_core.memory import RunMemory
from flowcache_core.models import bundle
from flowcache_core.models.adapter import Call
from flowcache_core.models.attention import BlockCausal, bidirectional
from flowcache_core.models.bundle import Bundle, files_of, load_bundle
from flowcache_core.models.skyreels import Rope, SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.network import NetworkSizes
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.training import salience as training
from flowcache_core.training.salience_clips import LEVELS, Clip, measure
from flowcache_core.training.salience_targets import Student, Teacher, counted, received, received_by_head

INFO = HeadInfo(2, 128, 16, 3, "some-model", "0" * 64, "some-model, bidirectional", 5, "Apache-2.0")
GRID, FRAME, CHUNK, FRAMES = (2, 2), 4, 12, 8
"""Height and width of a frame in tokens, tokens of a frame and of a chunk, latent frames of a film whose last chunk is short."""


def naive(q: Tensor, k: Tensor, chunk: int) -> Tensor:
    """float64 [B, H, 3, T], token by token as the formula stands."""
    p = (q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    out = torch.zeros(*q.shape[:2], 3, q.shape[2], dtype=torch.float64)
    for j in range(q.shape[2]):
        for i in range(q.shape[2]):
            which = SAME if i // chunk == j // chunk else LOW if i // chunk > j // chunk else UP
            out[:, :, which, j] = torch.maximum(out[:, :, which, j], p[:, :, i, j])
    return out


def a_head(seed: int = 0, info: HeadInfo = INFO) -> SalienceHead:
    torch.manual_seed(seed)
    return SalienceHead(info).requires_grad_(False)


def view_of(hidden: Tensor, carried: Tensor, memory: RunMemory, layer: int = 1) -> KVView:
    r, new, n = hidden.shape[0], hidden.shape[1], carried.shape[1]
    k = torch.randn(r, 2, n, 8)
    return KVView(layer, k, k, k[:, :, -new:], hidden, torch.arange(n).expand(r, -1), carried, new, FRAME, GRID, Rope(), RunMemory(), memory)


def a_clip(head: SalienceHead, seed: int, tokens: int = 48) -> Clip:
    """A clip whose attention is decided by the hidden state, in the shape that a measured one has."""
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(head.info.layers, tokens, head.info.in_dim, generator=rng)
    law = torch.randn(head.info.in_dim, 3, generator=torch.Generator().manual_seed(0)) / head.info.in_dim**0.5
    chunk = torch.arange(tokens) // CHUNK
    return Clip(hidden, (hidden @ law - 4).exp(), counted(tokens, CHUNK).T, chunk, places(torch.arange(tokens) % CHUNK, 3, GRID))


def network_of(layers: int = 2, width: int = 128, name: str = "skyreels-v2-df") -> NetworkSizes:
    """Sizes without weights."""
    return cast(NetworkSizes, SimpleNamespace(layers=layers, width=width, name=name))


def model_of(net: SkyReelsV2) -> Bundle:
    """The network as a model of chunks of three latent frames, without a VAE."""
    return Bundle(SKYREELS, net, None, replace(SKYREELS.layout, chunk_frames=3))


@pytest.fixture
def head_file(tmp_path: Path) -> Path:
    a_head().save(tmp_path / "head.safetensors")
    return tmp_path / "head.safetensors"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_damaged_head_is_refused_with_the_tensor_that_is(tmp_path: Path, value: float) -> None:
    head = a_head()
    with torch.no_grad():
        head.layer(1).fc1.weight[0, 1] = value
    head.save(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"nan\.safetensors is damaged: layers\.1\.fc1\.weight holds NaN or infinity"):
        SalienceHead.load(tmp_path / "nan.safetensors")


# what is taught


@pytest.mark.parametrize("tokens", [1, 5, 12, 13, 24, 31])
@pytest.mark.parametrize("at_most", [1, 150, 2**20])
def test_attention_received_in_blocks_equals_the_formula(tokens: int, at_most: int) -> None:
    q, k = torch.randn(2, 2, 3, tokens, 16) * 2
    expected = naive(q, k, CHUNK)
    torch.testing.assert_close(received_by_head(q, k, CHUNK, at_most).double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(received(q, k, CHUNK, at_most).double(), expected.mean(1), rtol=1e-5, atol=1e-7)


def test_the_greatest_of_the_three_is_the_strongest_query_of_all() -> None:
    q, k = torch.randn(2, 2, 3, 31, 16)
    p = (q.double() @ k.double().transpose(-1, -2) / 4).softmax(-1)
    torch.testing.assert_close(received_by_head(q, k, CHUNK).amax(2).double(), p.amax(2), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tokens", [12, 24, 31])
def test_what_no_query_can_see_is_zero_and_does_not_count(tokens: int) -> None:
    q, k = torch.randn(2, 1, 2, tokens, 16)
    some = received(q, k, CHUNK)[0] > 0
    assert torch.equal(some, counted(tokens, CHUNK))
    assert some[SAME].all()
    assert not some[UP, :CHUNK].any()
    assert not some[LOW, (tokens - 1) // CHUNK * CHUNK :].any()


def test_half_precision_queries_are_weighed_in_full() -> None:
    q, k = torch.randn(2, 1, 2, 31, 16).bfloat16()
    assert received(q, k, CHUNK).dtype == torch.float32
    torch.testing.assert_close(received_by_head(q, k, CHUNK).double(), naive(q, k, CHUNK), rtol=1e-5, atol=1e-7)


def test_measuring_changes_nothing_in_the_network(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    x, text, t = noise_of(FRAMES), net.text_kv(texts[:1]), torch.full((1, 1), 300.0)
    ends = [CHUNK, 2 * CHUNK, FRAMES * FRAME]
    assert torch.equal(net(x, t, text, Teacher(CHUNK)), net(x, t, text, bidirectional))
    assert torch.equal(net(x, t, text, Student(ends)), net(x, t, text, BlockCausal(ends)))


def test_a_head_learns_from_what_it_will_be_shown(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    """The hidden states of a measured clip are those of the commit passes, chunk by chunk against the KV cache."""
    x, adapter = noise_of(FRAMES), SkyReelsAdapter(net)
    clip = measure(model_of(net), x, texts[:1], 24, 0, FRAMES * FRAME)
    cache = KVCache(("a",), KVSizes(1, adapter.layers, adapter.heads, adapter.head_dim, FRAMES * FRAME))
    shown: list[list[Tensor]] = [[], []]
    for index, start in enumerate(range(0, FRAMES, 3)):
        frames = min(3, FRAMES - start)
        attend = CachedAttention(cache, slice(None), 0, start * FRAME, (start + frames) * FRAME)

        def noting(layer: int, q: Tensor, k: Tensor, v: Tensor, given: Tensor, attend: CachedAttention = attend) -> Tensor:
            shown[layer].append(given)
            return attend(layer, q, k, v, given)

        adapter.forward(Call(x[:, :, start : start + frames], 0.0, Chunk(index, start, frames, 50, 50), adapter.text(texts[:1]), 24), noting)
    torch.testing.assert_close(clip.hidden, torch.stack([torch.cat(parts, 1)[0] for parts in shown]), rtol=1e-4, atol=1e-4)


def test_a_clip_holds_what_the_teacher_sees_at_its_noise_levels(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    x, text = noise_of(FRAMES), net.text_kv(texts[:1])
    clip = measure(model_of(net), x, texts[:1], 24, 7, 10**6)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    for layer in range(2):
        seen = []
        for level in LEVELS:
            teacher = Teacher(CHUNK)
            net((1 - level) * x + level * noise, torch.full((1, 1), 1000 * level), text, teacher)
            seen.append(teacher.received[layer][0].T)
        torch.testing.assert_close(clip.received[layer], torch.stack(seen).mean(0), rtol=1e-4, atol=1e-6)
    assert torch.equal(clip.chunk, torch.arange(FRAMES * FRAME) // CHUNK)


def test_some_tokens_of_a_clip_are_those_of_the_whole(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    whole, some = (measure(model_of(net), noise_of(FRAMES), texts[:1], 24, 3, keep) for keep in (10**6, 10))
    at = [int((whole.hidden[0] == token).all(1).nonzero()) for token in some.hidden[0]]
    assert len(at) == 10
    assert at == sorted(set(at))
    for name in ("hidden", "received"):
        assert torch.equal(getattr(whole, name)[:, at], getattr(some, name))
    for name in ("counted", "chunk", "place"):
        assert torch.equal(getattr(whole, name)[at], getattr(some, name))


def test_places_tell_all_tokens_of_a_chunk_apart() -> None:
    waves = places(torch.arange(3 * 5 * 7), 3, (5, 7))
    assert float(torch.cdist(waves, waves).fill_diagonal_(1.0).min()) > 0.1
    frame, height, width = waves[50].split(8)
    assert torch.equal(frame, waves[69, :8])
    assert torch.equal(height, waves[50 + 35, 8:16])
    assert torch.equal(width, waves[50 + 7, 16:])


def test_the_place_in_a_short_chunk_is_counted_over_its_own_frames(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    clip = measure(model_of(net), noise_of(FRAMES), texts[:1], 24, 0, 10**6)
    expected = [places(torch.arange(frames * FRAME), frames, GRID) for frames in (3, 3, 2)]
    assert torch.equal(clip.place, torch.cat(expected))


def test_a_distilled_model_is_taught_by_the_one_above_it(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    """Hidden states are the model's own, what tokens receive is what they receive in the teacher."""
    torch.manual_seed(5)
    other = SkyReelsV2(net.config)
    other.load_state_dict({name: value + 0.05 * torch.randn_like(value) for name, value in net.state_dict().items()})
    mine, theirs = (measure(model_of(one), noise_of(FRAMES), texts[:1], 24, 0, 10**6) for one in (net, other.eval()))
    taught = measure(model_of(net), noise_of(FRAMES), texts[:1], 24, 0, 10**6, model_of(other))
    assert torch.equal(taught.hidden, mine.hidden)
    assert torch.equal(taught.received, theirs.received)
    assert not torch.allclose(mine.received, theirs.received)


# how it is learnt


def test_ranks_go_from_zero_to_one_over_what_counts() -> None:
    x = torch.tensor([[5.0, 1.0, 3.0, -9.0, 2.0]]).unsqueeze(-1)
    counts = torch.tensor([[True, True, True, False, True]]).unsqueeze(-1)
    assert training.ranks(x, counts)[0, [1, 4, 2, 0], 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_the_ranking_loss_is_that_of_the_pairs_that_count() -> None:
    said, wanted = torch.randn(2, 1, 20, 3)
    counts = torch.rand(1, 20, 3) > 0.3
    first, second = torch.randint(0, 20, (2, 50))
    losses = []
    for c in range(3):
        order = sorted(wanted[0, counts[0, :, c], c].tolist())
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            if not (counts[0, a, c] and counts[0, b, c]):
                continue
            apart = (order.index(float(wanted[0, a, c])) - order.index(float(wanted[0, b, c]))) / (len(order) - 1)
            if abs(apart) < training.GAP:
                continue
            better, worse = (a, b) if apart > 0 else (b, a)
            losses.append(float(torch.log1p(torch.exp(said[0, worse, c] - said[0, better, c]))))
    assert losses
    assert float(training.ranking_loss(said, wanted, counts, first, second)) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_uncounted_tokens_change_neither_loss_nor_statistics(tmp_path: Path) -> None:
    clip = a_clip(a_head(), 1)
    spoilt = replace(clip, received=torch.where(clip.counted, clip.received, 1e3))
    assert not torch.equal(clip.received, spoilt.received)
    figures = []
    for i, one in enumerate((clip, spoilt)):
        one.save(tmp_path / f"{i}.safetensors")
        head = a_head()
        training.take_statistics(head, [tmp_path / f"{i}.safetensors"])
        torch.manual_seed(3)
        figures.append((float(training.loss_of(head, [one])), head.layer(0).target_mean.tolist(), head.layer(1).target_std.tolist()))
    assert figures[0] == figures[1]


def test_targets_are_standardised_over_the_training_clips(tmp_path: Path) -> None:
    head, clips = a_head(), [a_clip(a_head(), seed) for seed in range(3)]
    for i, clip in enumerate(clips):
        clip.save(tmp_path / f"{i}.safetensors")
    training.take_statistics(head, [tmp_path / f"{i}.safetensors" for i in range(3)])
    for layer in range(2):
        for which in range(3):
            values = torch.cat([head.layer(layer).target(c.received[layer])[c.counted[:, which], which] for c in clips])
            assert float(values.mean()) == pytest.approx(0, abs=1e-4)
            assert float(values.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for i, path in enumerate(paths):
        a_clip(a_head(), i).save(path)
    straight = training.train(tmp_path / "straight", INFO, paths, 4, save_every=2)

    calls, real = [], training.loss_of

    def stopping(head: SalienceHead, clips: list[Clip]) -> Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(head, clips)

    monkeypatch.setattr(training, "loss_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        training.train(tmp_path / "stopped", INFO, paths, 4, save_every=2)
    monkeypatch.setattr(training, "loss_of", real)
    resumed = training.train(tmp_path / "stopped", INFO, paths, 4, save_every=2)
    untrained = a_head()
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(straight.layer(0).fc1.weight, untrained.layer(0).fc1.weight)


def test_a_head_learns_what_the_hidden_state_decides(tmp_path: Path) -> None:
    info = replace(INFO, layers=1, in_dim=16, hidden=8)
    paths = [tmp_path / f"{i}.safetensors" for i in range(12)]
    for i, path in enumerate(paths):
        a_clip(a_head(info=info), i).save(path)
    untrained = training.judge(a_head(info=info), paths[8:])[0]
    learnt = training.judge(training.train(tmp_path, info, paths[:8], 400), paths[8:])[0]
    assert abs(untrained["rank"]) < 0.6
    assert learnt["rank"] > 0.8
    assert learnt["rank_in_chunk"] > 0.7
    assert learnt["top_quarter"] > 0.5


def test_perfect_and_opposite_predictions_differ() -> None:
    x = torch.randn(40)
    assert training.spearman(x, x.exp()) == pytest.approx(1)
    assert training.spearman(x, -x) == pytest.approx(-1)
    assert training.recall(x, x.exp()) == 1
    assert training.recall(x, -x) == 0


# how it is stored


def test_a_head_comes_back_as_it_was_saved(head_file: Path) -> None:
    head, back = a_head(), SalienceHead.load(head_file)
    assert back.info == INFO
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in head.state_dict().items())
    x = torch.randn(2, 5, 128), torch.randn(2, 5, 24)
    assert torch.equal(head.layer(1)(*x), back.layer(1)(*x))
    assert {k.split(".", 2)[2] for k in back.state_dict()} == {
        "norm.weight", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "target_mean", "target_std",
    }  # fmt: skip


def test_metadata_make_the_round_trip() -> None:
    assert HeadInfo.read(INFO.metadata(), "x") == INFO
    assert INFO.metadata()["out"] == "low,same,up" == ",".join(OUT)
    assert all(isinstance(v, str) for v in INFO.metadata().values())


@pytest.mark.parametrize("key", sorted(INFO.metadata()))
def test_a_head_without_one_of_its_metadata_is_refused(head_file: Path, key: str) -> None:
    save_file(load_file(head_file), head_file, {k: v for k, v in INFO.metadata().items() if k != key})
    with pytest.raises(ValueError, match=r"head.safetensors is (no|not a whole) salience head"):
        SalienceHead.load(head_file)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": "pafu-salience/2"}, "its format is pafu-salience/2, not pafu-salience/1"),
        ({"out": "low,up,same"}, "its out is low,up,same, and only low,same,up"),
        ({"tap": "keys"}, "its tap is keys"),
        ({"place": "none"}, "its place is none"),
        ({"target_stat": "mass"}, "its target_stat is mass"),
        ({"layers": "many"}, "a number in its metadata cannot be read"),
        ({"weights": "1,2"}, "a number in its metadata cannot be read"),
        ({"layers": "3"}, r"7 missing \(layers\.2\.fc1\.bias, \.\.\.\) of 21 tensors"),
        ({"layers": "1"}, r"7 unknown \(layers\.1\.fc1\.bias, \.\.\.\) of 7 tensors"),
        ({"in_dim": "64"}, r"has shape \(128,\), but its metadata ask for \(64,\)"),
    ],
)
def test_a_head_that_is_something_else_is_refused(head_file: Path, change: dict[str, str], match: str) -> None:
    save_file(load_file(head_file), head_file, {**INFO.metadata(), **change})
    with pytest.raises(ValueError, match=match):
        SalienceHead.load(head_file)


def test_a_head_with_tensors_too_many_or_too_few_is_refused(head_file: Path) -> None:
    weights = load_file(head_file)
    save_file({**weights, "layers.0.fc3.weight": torch.ones(1)}, head_file, INFO.metadata())
    with pytest.raises(ValueError, match=r"1 unknown \(layers\.0\.fc3\.weight"):
        SalienceHead.load(head_file)
    save_file({k: v for k, v in weights.items() if k != "layers.1.target_std"}, head_file, INFO.metadata())
    with pytest.raises(ValueError, match=r"1 missing \(layers\.1\.target_std"):
        SalienceHead.load(head_file)


def test_missing_and_broken_files_are_refused(head_file: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no salience head .*nowhere\.safetensors: train one with python -m"):
        Salience(path=str(head_file.parent / "nowhere.safetensors")).for_network(network_of())
    head_file.write_bytes(head_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"head\.safetensors \(1000 bytes\) is not a whole safetensors file"):
        SalienceHead.load(head_file)


# what it does as a policy


def test_a_head_for_another_network_is_refused(head_file: Path) -> None:
    rule = Salience(path=str(head_file))
    assert isinstance(rule, LearntKVPolicy)
    assert rule.for_network(network_of()) == rule
    for layers, width in ((30, 128), (2, 1536)):
        with pytest.raises(ValueError, match=rf"2 layers of 128 channels \(some-model\), the model has {layers} layers of {width}: train one"):
            rule.for_network(network_of(layers, width))


def test_new_tokens_are_scored_by_the_head_and_old_ones_keep_their_score(head_file: Path) -> None:
    rule, memory = Salience(path=str(head_file), low=2.0, up=0.25, same=0.75), RunMemory()
    hidden = torch.randn(2, 8, 128)
    said = SalienceHead.load(head_file).layer(1)(hidden, places(torch.arange(8), 2, GRID))
    first = rule.score(view_of(hidden, torch.zeros(2, 8), memory))
    assert first.shape == (2, 1, 8)
    assert first.dtype == torch.float32
    torch.testing.assert_close(first[:, 0], 2.0 * said[..., LOW] + 0.75 * said[..., SAME] + 0.25 * said[..., UP])

    kept = first.mean(1)[:, [0, 3, 4]]
    second = rule.score(view_of(torch.randn(2, 4, 128), torch.cat([kept, torch.zeros(2, 4)], 1), memory))
    assert second.shape == (2, 1, 7)
    assert torch.equal(second[:, 0, :3], kept)


def test_a_token_scores_the_same_whatever_came_before_it_and_beside_it(head_file: Path) -> None:
    rule, hidden = Salience(path=str(head_file)), torch.randn(2, 8, 128)
    together = rule.score(view_of(hidden, torch.zeros(2, 8), RunMemory()))
    late = rule.score(view_of(hidden[1:], torch.randn(1, 19), RunMemory()))
    torch.testing.assert_close(late[:, :, 11:], together[1:])
    assert torch.equal(together, rule.score(view_of(hidden, torch.zeros(2, 8), RunMemory())))


def test_layers_have_heads_of_their_own_and_half_precision_is_read_in_full(head_file: Path) -> None:
    rule, hidden = Salience(path=str(head_file)), torch.randn(1, 8, 128).bfloat16()
    scores = [rule.score(view_of(hidden, torch.zeros(1, 8), RunMemory(), layer)) for layer in range(2)]
    assert not torch.allclose(*scores)
    torch.testing.assert_close(scores[1], rule.score(view_of(hidden.float(), torch.zeros(1, 8), RunMemory(), 1)), rtol=0, atol=0)


def test_a_head_is_read_once_until_its_file_changes(head_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = head_at(str(head_file))
    assert head_at(str(head_file)) is first
    a_head(1).save(head_file.with_name("other.safetensors"))
    head_file.write_bytes(head_file.with_name("other.safetensors").read_bytes())
    os.utime(head_file, ns=(1, 1))
    assert torch.equal(head_at(str(head_file)).layer(0).fc1.weight, a_head(1).layer(0).fc1.weight)
    monkeypatch.setattr(policy, "BUNDLED", head_file)
    assert head_at("") is head_at(str(head_file))


def test_a_run_keeps_the_head_it_began_with(head_file: Path) -> None:
    rule, memory, hidden = Salience(path=str(head_file)), RunMemory(), torch.randn(1, 4, 128)
    before = rule.score(view_of(hidden, torch.zeros(1, 4), memory))
    head_file.unlink()
    assert torch.equal(before, rule.score(view_of(hidden, torch.zeros(1, 4), memory)))


def test_settings_are_equal_by_value_and_kept_in_range() -> None:
    assert Salience(path="a") == Salience(path="a")
    assert hash(Salience(path="a")) == hash(Salience(path="a"))
    assert Salience(path="a") != Salience(path="b")
    with pytest.raises(ValueError, match=r"low is -1: it must lie between 0\.0 and 10\.0"):
        Salience(low=-1)
    with pytest.raises(ValueError, match="low, up and same are all 0"):
        Salience(low=0, up=0, same=0)


@pytest.mark.parametrize(("model", "teacher"), [("tiny-skyreels", "tiny-skyreels"), ("tiny-causal", "tiny-skyreels")])
def test_a_bundled_head_was_trained_for_its_bundled_network(model: str, teacher: str) -> None:
    """It is found by the kind of network, where no file is named."""
    family = bundle.BUNDLED[model]
    network = load_bundle(family=family).adapter()
    rule = fitted(Salience(), network)
    assert isinstance(rule, Salience)
    info = head_at(rule.path).info
    assert (info.base_model, info.layers, info.in_dim) == (model, network.layers, network.width)
    assert info.base_sha256 == hashlib.sha256(files_of(family)[0].read_bytes()).hexdigest(), f"train it anew: {policy.COMMAND} --model {model}"
    assert info.teacher.startswith(f"{teacher}, bidirectional")
    assert Path(rule.path).stat().st_size < 1_000_000

"""The network: sizes, rotary positions, noise levels per frame, and the order of its patches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowcache_core.models.adapter import Call
from flowcache_core.models.attention import BlockCausal, bidirectional
from flowcache_core.models.skyreels import HEAD_DIM, SkyReelsConfig, SkyReelsV2, rope_table, rotate, sinusoid
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.sampling.chunk import Chunk

RELEASED = (
    pytest.param(SkyReelsConfig(1536, 8960, 30, 4096, fps=True), 1.4355e9, 830, id="1.3B"),
    pytest.param(SkyReelsConfig(5120, 13824, 40, 4096, fps=False), 14.2885e9, 1095, id="14B"),
)
SIZES = (SkyReelsConfig(128, 256, 2, 64, fps=True), SkyReelsConfig(256, 384, 1, 32, channels=8))
KEYS = (
    "patch_embedding.weight", "text_embedding.2.bias", "time_projection.1.weight", "fps_embedding.weight", "fps_projection.2.bias",
    "blocks.0.self_attn.norm_q.weight", "blocks.1.cross_attn.o.bias", "blocks.0.norm3.weight", "blocks.0.ffn.2.weight", "blocks.1.modulation",
    "head.head.bias", "head.modulation",
)  # fmt: skip


def shapes_of(config: SkyReelsConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in SkyReelsV2(config).state_dict().items()}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


@pytest.mark.parametrize(("config", "parameters", "tensors"), RELEASED)
def test_released_sizes_have_the_published_number_of_parameters(config: SkyReelsConfig, parameters: float, tensors: int) -> None:
    shapes = shapes_of(config)
    assert len(shapes) == tensors
    assert count(shapes) == pytest.approx(parameters, rel=1e-3)
    assert SkyReelsConfig.from_shapes(shapes) == config


@pytest.mark.parametrize("config", SIZES)
def test_sizes_are_read_back_from_the_shapes(config: SkyReelsConfig) -> None:
    assert SkyReelsConfig.from_shapes(shapes_of(config)) == config


@pytest.mark.parametrize("key", KEYS)
def test_parameters_have_the_names_of_the_released_checkpoints(net: SkyReelsV2, key: str) -> None:
    assert key in net.state_dict()


def test_a_width_that_is_not_whole_heads_is_refused() -> None:
    shapes = {**shapes_of(SIZES[0]), "patch_embedding.weight": (100, 16, 1, 2, 2)}
    with pytest.raises(ValueError, match="the width 100 is not a multiple of 128"):
        SkyReelsConfig.from_shapes(shapes)


def test_shapes_of_another_network_are_refused_with_the_missing_key() -> None:
    with pytest.raises(ValueError, match=r"it has no text_embedding\.0\.weight"):
        SkyReelsConfig.from_shapes({"patch_embedding.weight": (128, 16, 1, 2, 2), "blocks.0.ffn.0.weight": (256, 128)})


def test_rotated_scores_depend_on_distances_only() -> None:
    q, k = torch.randn(2, 1, 1, 12, HEAD_DIM, dtype=torch.float32)
    near, far = (rope_table(start, 3, 2, 2) for start in (0, 40))
    scores = [rotate(q, rope) @ rotate(k, rope).transpose(-1, -2) for rope in (near, far)]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0], q @ k.transpose(-1, -2), atol=1e-2)


def test_a_rope_table_continues_where_the_one_before_it_ended() -> None:
    whole = rope_table(0, 5, 2, 3)
    assert torch.equal(whole, torch.cat([rope_table(0, 2, 2, 3), rope_table(2, 3, 2, 3)]))


def test_time_takes_the_first_22_pairs_and_height_and_width_21_each() -> None:
    grid = rope_table(0, 2, 2, 2).view(2, 2, 2, HEAD_DIM // 2)
    still = [(grid[1, 0, 0] - grid[0, 0, 0]).abs(), (grid[0, 1, 0] - grid[0, 0, 0]).abs(), (grid[0, 0, 1] - grid[0, 0, 0]).abs()]
    assert [d.nonzero().flatten().tolist() for d in still] == [list(range(22)), list(range(22, 43)), list(range(43, 64))]


def test_a_sinusoid_is_cosines_then_sines() -> None:
    s = sinusoid(torch.tensor([7.0]))[0]
    assert s[0].item() == pytest.approx(torch.tensor(7.0).cos().item())
    assert s[128].item() == pytest.approx(torch.tensor(7.0).sin().item())
    torch.testing.assert_close(s[:128].square() + s[128:].square(), torch.ones(128, dtype=torch.float64))


def test_one_level_for_all_equals_that_level_for_every_frame(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    x, text = noise_of(3, batch=2), net.text_kv(texts)
    each = net(x, torch.tensor([[500] * 3, [20] * 3]), text, bidirectional)
    one = net(x, torch.tensor([[500], [20]]), text, bidirectional)
    torch.testing.assert_close(one, each, rtol=1e-5, atol=1e-5)


def test_every_frame_hears_its_own_noise_level(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    x, text, alone = noise_of(3), net.text_kv(texts[:1]), BlockCausal([4, 8, 12], window=1)
    base = net(x, torch.tensor([[500, 500, 500]]), text, alone)
    moved = net(x, torch.tensor([[500, 100, 500]]), text, alone)
    assert [not torch.equal(base[:, :, f], moved[:, :, f]) for f in range(3)] == [False, True, False]


def test_the_frame_rate_is_heard(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    films = [net(noise_of(2), torch.tensor([[500]]), net.text_kv(texts[:1]), bidirectional, fps=fps) for fps in (16, 24)]
    assert (films[0] - films[1]).abs().max() > 1e-3


def test_the_frame_rate_is_heard_in_a_whole_window(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    x, text = noise_of(2), net.text_kv(texts[:1])
    films = [SkyReelsAdapter(net).whole(x, (0.5, 0.5), text, fps) for fps in (16, 24)]
    for film, fps in zip(films, (16, 24), strict=True):
        torch.testing.assert_close(film, net(x, torch.tensor([[500, 500]]), text, bidirectional, fps=fps), rtol=1e-5, atol=1e-5)
    assert (films[0] - films[1]).abs().max() > 1e-3


def test_the_prompt_is_heard(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    films = [net(noise_of(2), torch.tensor([[500]]), net.text_kv(text), bidirectional) for text in texts.split(1)]
    assert (films[0] - films[1]).abs().max() > 1e-3


def test_tokens_unfold_in_the_order_frame_row_column_channel(make_net: Callable[..., SkyReelsV2]) -> None:
    net, (f, h, w) = make_net(), (2, 3, 2)
    net.head.forward = lambda tokens, e: tokens  # type: ignore[method-assign]
    x = torch.randn(1, 16, f, 2 * h, 2 * w)
    patches = x.view(1, 16, f, h, 2, w, 2).permute(0, 2, 3, 5, 4, 6, 1).reshape(1, f * h * w, 2 * 2 * 16)
    assert torch.equal(net.velocity(patches, torch.empty(0), (f, h, w)), x)


def test_tokens_are_embedded_in_the_order_frame_row_column(net: SkyReelsV2) -> None:
    x = torch.zeros(1, 16, 2, 4, 6)
    base = net.embed(x)
    x[:, :, 1, 2:4, 4:6] = 1.0
    changed = (net.embed(x) - base).abs().amax(-1)[0].nonzero().flatten().tolist()
    assert changed == [1 * 6 + 1 * 3 + 2]


def test_fresh_weights_predict_zero_and_ignore_the_frame_rate() -> None:
    net = SkyReelsV2(SIZES[0])
    net.initialise()
    assert not net.head.head.weight.any()
    assert not net.fps_projection[2].weight.any()
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_operations_of_a_host_build_the_same_network() -> None:
    class Ops:
        Linear, LayerNorm, RMSNorm, Conv3d, Embedding = nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Conv3d, nn.Embedding

    assert SkyReelsV2(SIZES[0], Ops).state_dict().keys() == SkyReelsV2(SIZES[0]).state_dict().keys()


def test_an_adapter_says_what_the_session_needs(net: SkyReelsV2) -> None:
    adapter = SkyReelsAdapter(net)
    assert (adapter.layers, adapter.heads, adapter.head_dim) == (2, 1, HEAD_DIM)
    assert adapter.tokens_per_frame(4, 6) == 6
    with pytest.raises(ValueError, match="latents of 6x5 do not divide into patches of 2"):
        adapter.tokens_per_frame(5, 6)


def test_replaying_the_residual_of_the_same_step_gives_its_velocity(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    adapter = SkyReelsAdapter(net)
    call = Call(noise_of(3), 0.7, Chunk(0, 0, 3, 2, 6), adapter.text(texts[:1]), 24)
    velocity, residual = adapter.forward(call, bidirectional)
    torch.testing.assert_close(adapter.replay(call, residual), velocity, rtol=1e-5, atol=1e-5)


def test_changes_of_the_time_modulation_are_those_between_steps(net: SkyReelsV2) -> None:
    changes = SkyReelsAdapter(net).time_changes((0.9, 0.5, 0.5), 24, torch.device("cpu"))
    assert changes[0] == changes[2] == 0.0
    assert changes[1] > 0

"""A layer is passed over for a fused operation only where it is no more than its weights: whatever somebody has put on it is called."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from flowcache_core.kv.cache import CachedAttention, KVCache, KVSizes
from flowcache_core.kv.waiting import Waiting
from flowcache_core.models.attention import bidirectional
from flowcache_core.models.layers import OnePlusNorm, attended, fed_forward, modulated_norm, plain, post_normed, projected, turned
from flowcache_core.models.skyreels import SkyReelsV2, rope_table
from flowcache_core.network import LayerAttention

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(3))


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Carried(Tensor):
    """A weight of another kind, as quantisation has."""


def linear(kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    return kind(16, 16).requires_grad_(False)


def hooked() -> nn.Module:
    layer = linear()
    layer.register_forward_hook(lambda layer, given, out: 3 * out)
    return layer


def hooked_ahead() -> nn.Module:
    layer = linear()
    layer.register_forward_pre_hook(lambda layer, given: (3 * given[0],))
    return layer


def replaced() -> nn.Module:
    layer = linear()
    layer.forward = lambda x: 3 * x  # type: ignore[method-assign]
    return layer


def patched_in_the_call() -> nn.Module:
    layer = linear()
    layer.weight_function = [lambda weight: 3 * weight]  # type: ignore[assignment]
    return layer


def cast_in_the_call() -> nn.Module:
    layer = linear()
    layer.comfy_cast_weights = True  # type: ignore[assignment]
    return layer


def parametrised() -> nn.Module:
    return parametrizations.weight_norm(linear()).requires_grad_(False)


def carried() -> nn.Module:
    layer = linear()
    layer.weight = nn.Parameter(layer.weight.as_subclass(Carried), requires_grad=False)
    return layer


OTHERS: list[Callable[[], nn.Module]] = [
    hooked, hooked_ahead, replaced, patched_in_the_call, cast_in_the_call, parametrised, carried, lambda: linear(Tripled), lambda: linear().double(),
]  # fmt: skip


@pytest.mark.parametrize("make", OTHERS)
def test_what_is_more_than_its_weights_is_not_plain(make: Callable[[], nn.Module]) -> None:
    assert plain(linear(), X)
    assert not plain(make(), X)


@pytest.mark.parametrize("make", [hooked, hooked_ahead, replaced, lambda: linear(Tripled)])
def test_it_is_called(make: Callable[[], nn.Module]) -> None:
    layer = make()
    assert torch.equal(projected(layer, X), layer(X))


def test_gradients_pass_through_the_layer_itself() -> None:
    layer, norm = nn.Linear(16, 16).bfloat16(), nn.RMSNorm(16).bfloat16()
    with torch.enable_grad():
        assert not plain(layer, X.bfloat16())
        turned(norm, projected(layer, X.bfloat16(), "gelu-tanh"), rope_of(6), 16).sum().backward()
    assert layer.weight.grad is not None
    assert norm.weight.grad is not None


def rope_of(tokens: int) -> Tensor:
    angles = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(4))
    return torch.polar(torch.ones_like(angles), angles)


def test_a_norm_that_somebody_has_hooked_is_called() -> None:
    norm, scale = nn.RMSNorm(16).requires_grad_(False), torch.zeros(1, 1, 16)
    before = turned(norm, X, rope_of(6), 16)
    norm.register_forward_hook(lambda layer, given, out: 3 * out)
    torch.testing.assert_close(turned(norm, X, rope_of(6), 16), 3 * before)
    norm2 = nn.LayerNorm(16, elementwise_affine=False)
    before = modulated_norm(norm2, X, scale, scale)
    norm2.register_forward_hook(lambda layer, given, out: 3 * out)
    torch.testing.assert_close(modulated_norm(norm2, X, scale, scale), 3 * before)


def one_plus(size: int) -> OnePlusNorm:
    norm = OnePlusNorm(size, 1e-6)
    for weight in (norm.weight, norm.bias):
        nn.init.normal_(weight)
    return norm.requires_grad_(False)


def test_a_norm_of_heads_that_somebody_has_hooked_is_called() -> None:
    norm, post = one_plus(8), one_plus(16)
    before, after = turned(norm, X, rope_of(6)[:, :3], 8), post_normed(post, X, 2 * X, X[:, :1])
    for one in (norm, post):
        assert plain(one, X.bfloat16()), "it casts its weights"
        one.register_forward_hook(lambda layer, given, out: 3 * out)
    torch.testing.assert_close(turned(norm, X, rope_of(6)[:, :3], 8), 3 * before)
    torch.testing.assert_close(post_normed(post, X, 2 * X, X[:, :1]) - X, 3 * (after - X))


NORMS = pytest.mark.parametrize("norm", [nn.RMSNorm(16, eps=1e-6).requires_grad_(False), one_plus(8)], ids=["of the width", "of heads"])


def kept(norm: nn.Module, tokens: Tensor | None, dtype: torch.dtype, by_slots: bool, **settings: object) -> tuple[Tensor, Tensor, KVCache]:
    """Attention of six tokens, or of some of them, behind two slots of history -> output, all slots, the cache."""
    cache, x = KVCache(("a",), KVSizes(2, 1, 2, 8, 9)), (X if tokens is None else X[:, tokens]).to(dtype)
    buffers = cache.layer(0, x)
    for number, buffer in enumerate(buffers):
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(number)))
    mine, cached = copy.deepcopy(norm).to(dtype), CachedAttention(cache, slice(None), 0, 2, 8, tokens, **settings)  # type: ignore[arg-type]
    rope = rope_of(6)[:, :4] if tokens is None else rope_of(6)[tokens, :4]
    q, layer = turned(mine, x, rope, 8), LayerAttention(cached, 0)
    out = attended(layer if by_slots else lambda *given: layer(*given), q, mine, x, 2 * x, x, rope, 8)
    return out, torch.cat(buffers), cache


@NORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [None, torch.tensor([4, 0, 2])], ids=["a chunk", "some tokens"])
def test_keys_and_values_are_written_where_attention_keeps_them(
    norm: nn.Module, dtype: torch.dtype, tokens: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit as when they are handed over, and by nobody else."""
    handed, slots, _ = kept(norm, tokens, dtype, False)
    monkeypatch.setattr(KVCache, "write", None)
    out, written, _ = kept(norm, tokens, dtype, True)
    assert torch.equal(out, handed)
    assert torch.equal(written, slots)


@NORMS
def test_an_aside_and_a_chunk_whose_tokens_will_wait_have_them_handed_over(norm: nn.Module) -> None:
    out, slots, _ = kept(norm, None, torch.float32, True, aside=True)
    assert torch.equal(slots, kept(norm, torch.empty(0, dtype=torch.long), torch.float32, False)[1]), "the slots are as before"
    waiting = Waiting(6)
    waiting.begin(0, None)
    again, _, _ = kept(norm, None, torch.float32, True, waiting=waiting)
    assert torch.equal(out, again)
    assert waiting.bytes > 0


def test_a_feed_forward_part_with_another_activation_is_called_whole() -> None:
    layers = nn.Sequential(linear(), nn.GELU(approximate="tanh"), linear())
    assert torch.equal(fed_forward(layers, X), layers(X))
    layers[1] = nn.SiLU()
    assert torch.equal(fed_forward(layers, X), layers(X))
    layers[1] = nn.GELU()
    assert torch.equal(fed_forward(layers, X), layers(X))
    hooked = nn.Sequential(linear(), nn.GELU(approximate="tanh"), linear())
    hooked.register_forward_hook(lambda layer, given, out: 3 * out)
    assert torch.equal(fed_forward(hooked, X), hooked(X))


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_network_of_plain_layers_is_that_of_called_ones(
    dtype: torch.dtype, within: float, make_net: Callable[..., SkyReelsV2], texts: Tensor
) -> None:
    """A hook that does nothing turns every fused operation off."""
    fused, called = make_net().to(dtype), make_net().to(dtype)
    for module in called.modules():
        module.register_forward_pre_hook(lambda layer, given: None)
    x, t = torch.randn(2, 16, 3, 4, 4).to(dtype), torch.tensor([[700.0, 500.0, 0.0]]).expand(2, -1)
    a, b = (net(x, t, net.text_kv(texts.to(dtype)), bidirectional) for net in (fused, called))
    assert (a - b).norm() <= within * b.norm()


def test_tokens_lie_with_their_channels_side_by_side(net: SkyReelsV2) -> None:
    """Whatever is added to them keeps that layout through all blocks."""
    x, t = torch.randn(1, 16, 3, 4, 4), torch.tensor([[700.0]])
    tokens = net.embed(x)
    assert tokens.is_contiguous()
    _, e0 = net.modulation(t, 24, x.dtype)
    text = net.text_kv(torch.randn(1, 8, 64))
    assert net.stack(tokens, e0, text, rope_table(0, 3, 2, 2), bidirectional).is_contiguous()

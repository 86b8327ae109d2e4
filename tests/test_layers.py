"""A layer is passed over for a fused operation only where it is no more than its weights: whatever somebody has put on it is called."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from flowcache_core.models.attention import bidirectional
from flowcache_core.models.layers import fed_forward, modulated_norm, plain, projected, turned
from flowcache_core.models.skyreels import SkyReelsV2, rope_table

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

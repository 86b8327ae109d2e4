"""The MAGI-1 network against its formulas, written out plainly in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowcache_core.kernels.head_rotation import rotate_halves
from flowcache_core.models.magi import Magi, MagiConfig, Rope, rope_table
from flowcache_core.models.magi_adapter import MagiAdapter
from tests.tiny_magi import GATED, PLAIN, tiny_magi

CONFIGS = pytest.mark.parametrize("config", [PLAIN, GATED], ids=["4.5B", "24B"])
GRID = (3, 4)


def network_of(config: MagiConfig) -> Magi:
    return tiny_magi(config).double()


def weights_of(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in network.state_dict().items() if key.startswith(prefix)}


def one_plus(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    spread = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (spread + 1e-6).sqrt() * (1 + weights[f"{name}.weight"]) + weights[f"{name}.bias"]


def affine(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return one_plus(x, {f"{name}.weight": weights[f"{name}.weight"] - 1, f"{name}.bias": weights[f"{name}.bias"]}, name)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """[heads, T, D] by angles [T, n]: channels i and i + n."""
    n, out = angles.shape[1], x.clone()
    a, b = x[..., :n], x[..., n : 2 * n]
    out[..., :n] = a * angles.cos() - b * angles.sin()
    out[..., n : 2 * n] = a * angles.sin() + b * angles.cos()
    return out


def angles_of(bands: Tensor, start: int, frames: int, height: int, width: int) -> Tensor:
    r = math.sqrt(height * width / 256)
    rows = []
    for t in range(start, start + frames):
        for y in range(height):
            for x in range(width):
                h = (y - (height - 1) / 2) / (height - 1) * (height / r - 1)
                w = (x - (width - 1) / 2) / (width - 1) * (width / r - 1)
                rows.append(torch.cat([t * bands, h * bands, w * bands]))
    return torch.stack(rows)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[heads, T, D], [key heads, L, D] twice: head h looks at key head h // (heads / key heads)."""
    share = q.shape[0] // k.shape[0]
    out = []
    for head in range(q.shape[0]):
        weights = (q[head] @ k[head // share].T / q.shape[2] ** 0.5).softmax(-1)
        out.append(weights @ v[head // share])
    return torch.stack(out)


def heads_of(x: Tensor, size: int) -> Tensor:
    return torch.stack(x.split(size, 1))


def layer_reference(config: MagiConfig, w: Mapping[str, Tensor], x: Tensor, condition: Tensor, words: Tensor, angles: Tensor) -> Tensor:
    """One layer over x [T, d], as the formulas have it."""
    size, d = config.head_dim, config.dim
    gates = torch.tanh(F.silu(condition) @ w["ada_modulate_layer.proj.0.weight"].T + w["ada_modulate_layer.proj.0.bias"])
    at = "self_attention."
    h = affine(x, w, at + "linear_qkv.layer_norm")
    q, qx, k, v = (heads_of(h @ w[f"{at}linear_qkv.{name}.weight"].T, size) for name in ("q", "qx", "k", "v"))
    q, k = (turned(one_plus(y, w, at + name), angles) for y, name in ((q, "q_layernorm"), (k, "k_layernorm")))
    seen = softmax_attention(q, k, v)
    kv = heads_of(words @ w[at + "linear_kv_xattn.weight"].T, 2 * size)
    told = softmax_attention(one_plus(qx, w, at + "q_layernorm_xattn"), one_plus(kv[..., :size], w, at + "k_layernorm_xattn"), kv[..., size:])
    flat = [y.transpose(0, 1).flatten(1) for y in (seen, told)]
    part = d // 8
    interleaved = torch.cat([y[:, g * part : (g + 1) * part] for g in range(8) for y in flat], 1)
    x = x + one_plus(interleaved @ w[at + "linear_proj.weight"].T * gates[:d], w, "self_attn_post_norm")
    h = affine(x, w, "mlp.layer_norm") @ w["mlp.linear_fc1.weight"].T
    if config.gated:
        h = h[:, : config.ffn_dim] * torch.sigmoid(h[:, : config.ffn_dim]) * h[:, config.ffn_dim :]
    else:
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return x + one_plus(h @ w["mlp.linear_fc2.weight"].T * gates[d:], w, "mlp_post_norm")


def time_reference(w: Mapping[str, Tensor], t: float) -> Tensor:
    angle = 1000 * t * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    h = F.silu(torch.cat([angle.cos(), angle.sin()]) @ w["t_embedder.mlp.0.weight"].T + w["t_embedder.mlp.0.bias"])
    return h @ w["t_embedder.mlp.2.weight"].T + w["t_embedder.mlp.2.bias"]


@CONFIGS
def test_a_layer_is_its_formula(config: MagiConfig) -> None:
    network = network_of(config)
    tokens, condition, words = torch.randn(24, config.dim).double(), torch.randn(config.dim // 4).double(), torch.randn(5, config.dim).double()
    layer = network.videodit_blocks.layers[1]
    rope = torch.polar(torch.ones(24, 3 * config.bands).double(), angles_of(network.rope.bands, 6, 2, *GRID))
    text = layer.self_attention.text_kv(words[None])
    mine = layer(tokens[None], condition[None, None], [text], rope, dense_attention)[0]
    wanted = layer_reference(config, weights_of(network, "videodit_blocks.layers.1."), tokens, condition, words,
                             angles_of(network.rope.bands, 6, 2, *GRID))  # fmt: skip
    torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-10)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return torch.stack([softmax_attention(*one) for one in zip(q, k, v, strict=True)])


@CONFIGS
def test_time_and_dropped_text_make_the_condition(config: MagiConfig) -> None:
    network = network_of(config)
    w = network.state_dict()
    said = network.condition(torch.tensor([0.25], dtype=torch.float64), (False, True), 2, 32.0, torch.float64)
    both = time_reference(w, 0.25) + time_reference(w, 32.0)
    rows = [
        w["y_embedder.null_caption_embedding"][row] @ w["y_embedder.y_proj_adaln.0.weight"].T + w["y_embedder.y_proj_adaln.0.bias"]
        for row in (-2, -1)
    ]
    wanted = torch.stack([both + rows[0]] * 2 + [both + rows[1]] * 2)[:, None]
    torch.testing.assert_close(said, wanted, rtol=1e-10, atol=1e-10)
    plain = network.condition(torch.tensor([0.25], dtype=torch.float64), (True,), 1, None, torch.float64)
    torch.testing.assert_close(plain[0, 0], time_reference(w, 0.25) + rows[1], rtol=1e-10, atol=1e-10)


@CONFIGS
def test_tokens_are_patches_and_velocity_is_noise_minus_clean(config: MagiConfig) -> None:
    network = network_of(config)
    w, x = network.state_dict(), torch.randn(1, 16, 2, 6, 8).double()
    tokens = network.embed(x)
    given = torch.cat([x, x], 1) * 0.1 if config.doubled else x
    patch = given[0, :, 1, 2:4, 4:6]
    torch.testing.assert_close(tokens[0, 12 + 4 + 2], torch.einsum("dcyx,cyx->d", w["x_embedder.weight"][:, :, 0], patch))
    torch.testing.assert_close(network.embed_some(x, torch.tensor([3, 18])), tokens[:, [3, 18]])
    velocity = network.velocity(tokens, (2, *GRID))
    said = one_plus(tokens[0, 18], w, "videodit_blocks.final_layernorm") @ w["final_linear.linear.weight"].T
    clean_minus_noise = said.view(2, 2, config.channels).permute(2, 0, 1)[:16] / (0.1 if config.doubled else 1)
    torch.testing.assert_close(velocity[0, :, 1, 2:4, 4:6], -clean_minus_noise)
    torch.testing.assert_close(network.head(tokens)[0, 18], said)


@CONFIGS
def test_text_is_projected_once(config: MagiConfig) -> None:
    network = network_of(config)
    w, text = network.state_dict(), torch.randn(1, 5, config.text_dim).double()
    hidden = F.silu(text[0] @ w["y_embedder.y_proj_xattn.0.weight"].T + w["y_embedder.y_proj_xattn.0.bias"])
    kv = heads_of(hidden @ w["videodit_blocks.layers.0.self_attention.linear_kv_xattn.weight"].T, 2 * config.head_dim)
    k, v = network.text_kv(text)[0]
    wanted = one_plus(kv[..., : config.head_dim], weights_of(network, "videodit_blocks.layers.0.self_attention."), "k_layernorm_xattn")
    torch.testing.assert_close(k[0], wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(v[0], kv[..., config.head_dim :], rtol=1e-10, atol=1e-10)


def test_rotary_positions_are_those_of_the_formula() -> None:
    bands = tiny_magi(PLAIN).rope.bands
    table = rope_table(bands, 6, 2, 5, 7, "cpu")
    torch.testing.assert_close(table.angle(), torch.polar(torch.ones(70, 12).double(), angles_of(bands.double(), 6, 2, 5, 7)).angle().float())
    x = torch.randn(2, 70, 32)
    torch.testing.assert_close(rotate_halves(x, table), turned(x, angles_of(bands, 6, 2, 5, 7)), rtol=1e-4, atol=1e-5)
    assert torch.equal(rotate_halves(x, table)[..., 24:], x[..., 24:])


def test_a_frame_of_2025_tokens_reaches_as_far_as_one_of_256() -> None:
    table = rope_table(torch.tensor([0.1]), 0, 1, 45, 45, "cpu").angle().view(45, 45, 3)
    torch.testing.assert_close(table[[0, 44], 0, 1], torch.tensor([-0.75, 0.75]))


def test_a_move_along_time_is_a_move_of_the_table() -> None:
    rotary = Rope(lambda: tiny_magi(PLAIN).rope.bands)
    here, there, move = rotary.phases(2, 1, GRID), rotary.phases(9, 1, GRID), rotary.shift(7)
    torch.testing.assert_close(here * move, there)
    x = torch.randn(1, 2, 12, 32)
    torch.testing.assert_close(rotary.turn(rotary.turn(x, here), here.conj()), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_dtype_goes_through(dtype: torch.dtype) -> None:
    network = tiny_magi(PLAIN).to(dtype)
    adapter = MagiAdapter(network, dtype)
    assert adapter.token_grid(6, 8) == GRID
    with pytest.raises(ValueError, match="latents of 9x6 do not divide into patches of 2: use a picture whose sides are multiples of 16 pixels"):
        adapter.token_grid(6, 9)
    tokens = network.embed(torch.randn(1, 16, 2, 6, 8, dtype=dtype))
    assert tokens.dtype == network.velocity(tokens, (2, *GRID)).dtype == dtype

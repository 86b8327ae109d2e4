"""Films of causal Wan models: the network against its formulas, a film against the published loop without a cache, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, silu

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores.even import Even
from flowcache_core.models.attention import BlockCausal
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.causal_wan import HORIZON
from flowcache_core.models.causal_wan_family import CAUSAL, CAUSVID, FRAMEWISE, KREA_REALTIME, LONGLIVE, SELF_FORCING
from flowcache_core.models.family import Family
from flowcache_core.models.lora_names import lora_names
from flowcache_core.run.generate import Given, Job, generate, generate_upstream
from tests.tiny_causal import TEXT_DIM, tiny_causal

FILM = {"frames": 33, "size": 32, "seed": 3}
"""Nine latent frames of four tokens."""
EACH = pytest.mark.parametrize("family", CAUSAL, ids=lambda family: family.name)


class Words(Bundle):
    """Two words, without a text encoder."""

    def text(self, prompt: str) -> Tensor:
        return torch.randn(1, 2, TEXT_DIM, generator=torch.Generator().manual_seed(len(prompt)))


def bundle(family: Family = SELF_FORCING) -> Bundle:
    return Words(family, tiny_causal(), nn.Identity(), family.layout)


def film(family: Family = SELF_FORCING, compressor: Compressor | None = None, given: Given | None = None, **changes: Any) -> Tensor:
    return generate(bundle(family), Job.usual(family, "a text", **{**FILM, **changes}), compressor=compressor, given=given or Given())[0]


# the network


def turned(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[T, heads, 128] by the position of every token: 22 pairs of neighbours for time, 21 for height, 21 for width."""
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid))
    angles = torch.cat([places[:, axis, None] / 10000 ** (torch.arange(0, size, 2) / size) for axis, size in enumerate((44, 42, 42))], 1)[:, None]
    even, odd, cos, sin = x[..., ::2], x[..., 1::2], angles.cos(), angles.sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def attended(w: Mapping[str, Tensor], name: str, x: Tensor, of: Tensor, grid: tuple[int, int, int] | None, mask: Tensor | None) -> Tensor:
    def normed(which: str, source: Tensor) -> Tensor:
        y = source @ w[f"{name}.{which}.weight"].T + w[f"{name}.{which}.bias"]
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.norm_{which}.weight"]
        y = y.unflatten(-1, (-1, 128))
        return y if grid is None else turned(y, grid)

    q, k = normed("q", x), normed("k", of)
    v = (of @ w[f"{name}.v.weight"].T + w[f"{name}.v.bias"]).unflatten(-1, (-1, 128))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(128)
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    return out @ w[f"{name}.o.weight"].T + w[f"{name}.o.bias"]


def velocity_by_formulas(w: Mapping[str, Tensor], x: Tensor, t: Tensor, text: Tensor, chunk_frames: int) -> Tensor:
    """Wan 2.1 report, section 4.2, with a timestep t [F] for every latent frame and attention to this chunk and those before it; one film
    [C, F, h, w], in float64."""
    f, h, wide = x.shape[1], x.shape[2] // 2, x.shape[3] // 2
    patches = x.unflatten(3, (wide, 2)).unflatten(2, (h, 2)).permute(1, 2, 4, 0, 3, 5).reshape(f * h * wide, -1)
    y = patches @ w["patch_embedding.weight"].flatten(1).T + w["patch_embedding.bias"]
    angle = t[:, None] / 10000 ** (torch.arange(128, dtype=torch.float64) / 128)
    e = torch.cat([angle.cos(), angle.sin()], 1) @ w["time_embedding.0.weight"].T + w["time_embedding.0.bias"]
    e = silu(e) @ w["time_embedding.2.weight"].T + w["time_embedding.2.bias"]
    e0 = (silu(e) @ w["time_projection.1.weight"].T + w["time_projection.1.bias"]).unflatten(1, (6, -1))
    words = gelu(text @ w["text_embedding.0.weight"].T + w["text_embedding.0.bias"], approximate="tanh")
    words = words @ w["text_embedding.2.weight"].T + w["text_embedding.2.bias"]
    chunk = torch.arange(f * h * wide) // (chunk_frames * h * wide)
    mask, width = chunk[:, None] >= chunk, y.shape[1]
    for layer in range(1 + max(int(key.split(".")[1]) for key in w if key.startswith("blocks."))):
        name = f"blocks.{layer}"
        m = (w[f"{name}.modulation"] + e0).repeat_interleave(h * wide, 0)
        z = layer_norm(y, (width,), eps=1e-6) * (1 + m[:, 1]) + m[:, 0]
        y = y + attended(w, f"{name}.self_attn", z, z, (f, h, wide), mask) * m[:, 2]
        z = layer_norm(y, (width,), w[f"{name}.norm3.weight"], w[f"{name}.norm3.bias"], 1e-6)
        y = y + attended(w, f"{name}.cross_attn", z, words, None, None)
        z = layer_norm(y, (width,), eps=1e-6) * (1 + m[:, 4]) + m[:, 3]
        z = gelu(z @ w[f"{name}.ffn.0.weight"].T + w[f"{name}.ffn.0.bias"], approximate="tanh")
        y = y + (z @ w[f"{name}.ffn.2.weight"].T + w[f"{name}.ffn.2.bias"]) * m[:, 5]
    m = (w["head.modulation"] + e[:, None]).repeat_interleave(h * wide, 0)
    y = (layer_norm(y, (width,), eps=1e-6) * (1 + m[:, 1]) + m[:, 0]) @ w["head.head.weight"].T + w["head.head.bias"]
    return y.view(f, h, wide, 2, 2, -1).permute(5, 0, 1, 3, 2, 4).reshape(-1, f, 2 * h, 2 * wide)


@pytest.mark.parametrize("chunk_frames", [1, 3])
def test_a_step_of_the_network_is_its_formulas(chunk_frames: int) -> None:
    """The whole film at once, chunk after chunk less noisy, at timesteps that are no whole numbers."""
    network, x, text = tiny_causal(), torch.randn(1, 16, 6, 4, 6), torch.randn(1, 3, TEXT_DIM)
    t = torch.tensor([0, 0, 0, 833.3333, 833.3333, 833.3333])
    wanted = velocity_by_formulas({k: v.double() for k, v in network.state_dict().items()}, x[0].double(), t.double(), text[0].double(), chunk_frames)
    ends = range(chunk_frames * 6, 6 * 6 + 1, chunk_frames * 6)
    out = network(x, t[None], network.text_kv(text), BlockCausal(list(ends)))
    torch.testing.assert_close(out[0].double(), wanted, rtol=2e-4, atol=2e-5)


# films


def published_loop(family: Family, frames: int, side: int, seed: int, scale: float = 1.0, given: Tensor | None = None) -> Tensor:
    """Self-Forcing, algorithm 2, without a KV cache: every evaluation sees the clean chunks before it under a mask, and commits nothing."""
    made, levels, size = bundle(family), family.noise.levels(family.usual.steps, family.noise.shift), family.layout.chunk_frames
    network, branches = made.network, ("a text", "") if scale != 1 else ("a text",)
    texts = [network.text_kv(made.text(prompt)) for prompt in branches]
    x = torch.randn(1, 16, frames, side, side, generator=torch.Generator().manual_seed(seed))
    before = 0 if given is None else given.shape[2]
    if given is not None:
        x[:, :, :before] = given
    for chunk, start in enumerate(range(before, frames, size)):
        end = min(start + size, frames)
        ends = [place * side * side // 4 for place in (before, *range(before + size, end, size), end) if place]
        for step, (now, to) in enumerate(pairwise(levels)):
            t = torch.tensor([[0.0] * start + [round(1000 * now) if family is CAUSVID else 1000 * now] * (end - start)])
            each = [network(x[:, :, :end], t, text, BlockCausal(ends))[:, :, start:] for text in texts]
            velocity = each[0] if scale == 1 else each[1] + scale * (each[0] - each[1])
            clean = x[:, :, start:end] - now * velocity
            torch.manual_seed(seed + 1000 * chunk + step)
            x[:, :, start:end] = clean if to == 0 else (1 - to) * clean + to * torch.randn_like(clean)
    return x


@EACH
def test_a_film_is_the_published_loop_over_chunks_and_steps(family: Family) -> None:
    torch.testing.assert_close(film(family), published_loop(family, 9, 4, 3), rtol=1e-3, atol=1e-3)


def test_a_film_with_guidance_a_short_last_chunk_and_a_start_image() -> None:
    start = torch.randn(1, 16, 1, 4, 4)
    torch.testing.assert_close(film(cfg=3.0, frames=25), published_loop(SELF_FORCING, 7, 4, 3, 3.0), rtol=1e-3, atol=1e-3)
    mine = film(frames=25, given=Given(start=start))
    torch.testing.assert_close(mine, published_loop(SELF_FORCING, 7, 4, 3, given=start), rtol=1e-3, atol=1e-3)
    assert torch.equal(mine[:, :, :1], start)


def test_an_empty_prompt_is_another_film() -> None:
    assert not torch.allclose(film(), film(cfg=3.0), atol=1e-2)
    assert not torch.equal(film(), film(seed=4))


def test_every_chunk_makes_its_few_steps_and_one_clean_pass() -> None:
    _, report = generate(bundle(), Job.usual(SELF_FORCING, "a text", **FILM))
    assert (report.chunk_steps, report.commits) == (3 * 4, 2)


def test_beyond_the_trained_horizon_memory_stays_what_it_is() -> None:
    made, peaks = bundle(), []
    for frames in (81, 321):
        out, report = generate(made, Job.usual(SELF_FORCING, "a text", frames=frames, size=16))
        assert torch.isfinite(out).all()
        peaks.append(report.kv_peak_bytes)
    assert peaks[0] == peaks[1] > 0


def test_a_budget_with_room_for_all_is_none() -> None:
    assert torch.equal(film(), film(compressor=Compressor(Even(), 3.0)))
    assert not torch.equal(film(), film(compressor=Compressor(Even(), 1.34)))


# noise levels


def test_noise_levels_are_the_published_ones() -> None:
    assert SELF_FORCING.noise.levels(4, 5.0) == pytest.approx((1, 0.9375, 5 / 6, 0.625, 0))
    assert FRAMEWISE.noise == SELF_FORCING.noise
    assert CAUSVID.noise.levels(3, CAUSVID.noise.shift) == pytest.approx((1, 28 / 37, 12 / 23, 0))
    assert KREA_REALTIME.noise.levels(4, 5.0) == (1, 0.937, 0.833, 0.625, 0)
    assert [SELF_FORCING.noise.timestep(sigma) for sigma in (1.0, 0.9375, 0.625, 0.0)] == [1000, 937.5, 625, 0]
    for level, whole in zip(CAUSVID.noise.levels(3, CAUSVID.noise.shift), (1000, 757, 522, 0), strict=True):
        assert CAUSVID.noise.timestep(level) == bundle(CAUSVID).adapter().timestep(level) == whole
    assert SELF_FORCING.noise.levels(4, 3.0) == pytest.approx((1, 0.9, 0.75, 0.5, 0))


@pytest.mark.parametrize("shift", [0.0, -3.0, math.nan, math.inf])
def test_a_shift_that_makes_no_levels_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match="makes no noise levels: use a number above 0, 5 is the published setting"):
        SELF_FORCING.noise.levels(4, shift)


@EACH
def test_a_curve_goes_through_the_trained_levels(family: Family) -> None:
    noise, count = family.noise, family.usual.steps
    levels = noise.levels(count, noise.shift)
    assert [noise.level(step / count, noise.shift) for step in range(count + 1)] == pytest.approx(levels)  # type: ignore[attr-defined]
    assert noise.level(torch.linspace(0, 1, count + 1), noise.shift).tolist() == pytest.approx(levels, abs=1e-6)  # type: ignore[attr-defined]
    family.check_levels(levels)
    family.check_levels(levels[1:])


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"steps": 6}, r"Self-Forcing was distilled on 4 noise levels, 1, 0.9375, 0.8333, 0.625, and 0.9615 is none .* with 4 or 2 or 1 steps"),
    ({"shift": 8.0}, r"and 0.96 is none of them \(4 steps were asked for\)"),
    ({"ar_step": 1}, r"with ar_step 1 and 4 steps a chunk would look back on noise: set ar_step to -1, which is as published, or to 4"),
    ({"ar_step": 0, "frames": 33}, r"with ar_step 0 and 4 steps"),
])  # fmt: skip
def test_settings_that_were_not_trained_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        film(**changes)


def test_fewer_steps_of_the_trained_levels_and_a_lone_chunk_go_through() -> None:
    for changes in ({"steps": 2}, {"steps": 1}, {"frames": 9, "ar_step": 0}):
        assert torch.isfinite(film(**changes)).all()


def test_what_the_network_was_not_made_for_is_refused() -> None:
    with pytest.raises(ValueError, match="was not trained with given last frames: leave them out"):
        film(given=Given(end=torch.zeros(1, 16, 1, 4, 4)))
    with pytest.raises(ValueError, match="causal-wan looks back only"):
        generate_upstream(bundle(), Job.usual(SELF_FORCING, "a text", **FILM))
    with pytest.raises(ValueError, match="30 frames per second were asked for"):
        film(fps=30)
    for chunk, layout in ((1, SELF_FORCING.layout), (3, FRAMEWISE.layout), (3, replace(SELF_FORCING.layout, chunk_frames=4))):
        with pytest.raises(
            ValueError, match=rf"trained with {layout.chunk_frames} latent frames? per chunk, and chunk_frames is {chunk}: set it to 0"
        ):
            SELF_FORCING.require_chunk(chunk, layout)
    SELF_FORCING.require_chunk(4, replace(SELF_FORCING.layout, chunk_frames=4))


@EACH
def test_a_family_looks_back_over_the_frames_of_its_training(family: Family) -> None:
    layout = family.layout
    assert layout.window * layout.chunk_frames == (12 if family is LONGLIVE else HORIZON)
    assert (layout.fps, layout.causal, family.known_by_shapes) == (16, True, False)


# a LoRA of a training state


@pytest.mark.parametrize("key", [
    "generator_lora.base_model.model.blocks.0.self_attn.q.lora_A.weight",
    "generator_lora.base_model.model.blocks.0.self_attn.q.lora_A.default.weight",
    "generator_lora.base_model.model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.self_attn.q.lora_A.weight",
    "generator.model.blocks.0.self_attn.q.lora_A.weight",
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
    "blocks.0.self_attn.q.lora_A.weight",
    "transformer.blocks.0.self_attn.q.lora_A.weight",
    "transformer.blocks.0.attn1.to_q.lora_A.weight",
])  # fmt: skip
def test_a_layer_of_a_lora_has_its_released_name(key: str) -> None:
    keys = [key, *(["critic_lora.blocks.1.self_attn.q.lora_A.weight"] if key.startswith("generator") else [])]
    assert lora_names(keys) == {key: "blocks.0.self_attn.q.lora_A.weight"}

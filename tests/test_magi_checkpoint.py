"""MAGI-1 files: base, distilled and fp8 releases are recognised by their shapes, and nothing else is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowcache_core.models import FAMILIES, checkpoint
from flowcache_core.models.bundle import NETWORK
from flowcache_core.models.magi import rope_table
from flowcache_core.models.magi_family import MAGI, MAGI_DISTILLED
from flowcache_core.models.quantised import FLOAT8, column_factors, is_companion, restored, scale_key, unstacked
from flowcache_core.models.shards import open_checkpoint
from flowcache_core.models.skyreels_family import SKYREELS
from tests.tiny_magi import GATED, PLAIN, tiny_magi

RELEASES = {"MAGI-1 4.5B": (3072, 12288, 34, 16, False), "MAGI-1 24B": (6144, 16384, 48, 32, True)}
TENSORS = {"MAGI-1 4.5B": (898, 4.4599e9), "MAGI-1 24B": (1262, 23.8993e9)}
DIVIDED = {"q": "input", "qx": "input", "k": "input", "v": "input", "linear_fc1": "input", "linear_proj": "smooth", "linear_fc2": "smooth"}
"""Layers that the fp8 release stores in few bits, and whether its input's channels have an input_scale or a smooth_scale each."""


KNOWN = (SKYREELS, MAGI, MAGI_DISTILLED)
recognise = partial(checkpoint.recognise, families=KNOWN)
load_network_file = partial(checkpoint.load_network_file, families=KNOWN)
load_network = partial(checkpoint.load_network, families=KNOWN)


def released(dim: int, ffn: int, layers: int, channels: int, gated: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes as in the files that were published."""
    c, at = dim // 4, "videodit_blocks.layers"
    yield "x_embedder.weight", (dim, channels, 1, 2, 2)
    for part, width in (("mlp.0", 256), ("mlp.2", c)):
        yield f"t_embedder.{part}.weight", (c, width)
        yield f"t_embedder.{part}.bias", (c,)
    yield "y_embedder.null_caption_embedding", (800, 4096)
    for part, width in (("y_proj_xattn.0", dim), ("y_proj_adaln.0", c)):
        yield f"y_embedder.{part}.weight", (width, 4096)
        yield f"y_embedder.{part}.bias", (width,)
    yield "rope.bands", (16,)
    for i in range(layers):
        yield f"{at}.{i}.ada_modulate_layer.proj.0.weight", (2 * dim, c)
        yield f"{at}.{i}.ada_modulate_layer.proj.0.bias", (2 * dim,)
        heads = [(f"self_attention.{k}_layernorm{x}", 128) for k in "qk" for x in ("", "_xattn")]
        layer = [(norm, dim) for norm in ("self_attention.linear_qkv.layer_norm", "self_attn_post_norm", "mlp.layer_norm", "mlp_post_norm")]
        for norm, width in heads + layer:
            yield f"{at}.{i}.{norm}.weight", (width,)
            yield f"{at}.{i}.{norm}.bias", (width,)
        for name, rows in (("q", dim), ("qx", dim), ("k", 1024), ("v", 1024)):
            yield f"{at}.{i}.self_attention.linear_qkv.{name}.weight", (rows, dim)
        yield f"{at}.{i}.self_attention.linear_kv_xattn.weight", (2048, dim)
        yield f"{at}.{i}.self_attention.linear_proj.weight", (dim, 2 * dim)
        yield f"{at}.{i}.mlp.linear_fc1.weight", ((1 + gated) * ffn, dim)
        yield f"{at}.{i}.mlp.linear_fc2.weight", (dim, ffn)
    for end in ("weight", "bias"):
        yield f"videodit_blocks.final_layernorm.{end}", (dim,)
    yield "final_linear.linear.weight", (4 * channels, dim)


def on_meta(release: str, fp8: bool = False) -> dict[str, Tensor]:
    weights = {key: torch.empty(shape, device="meta", dtype=torch.bfloat16) for key, shape in released(*RELEASES[release])}
    last = RELEASES[release][2] - 1
    for key in list(weights) if fp8 else []:
        layer, _, end = key.rpartition(".")
        if is_quantised(key, last) and end == "weight":
            rows, columns = weights[key].shape
            weights[key] = torch.empty(1, rows, columns, device="meta", dtype=torch.float8_e4m3fn)
            weights[f"{layer}.weight_scale"] = torch.empty(1, device="meta")
            smooth = DIVIDED[layer.rpartition(".")[2]] == "smooth"
            weights[f"{layer}.input_scale"] = torch.empty(1 if smooth else columns, device="meta")
            if smooth:
                weights[f"{layer}.smooth_scale"] = torch.empty(1, columns, device="meta")
    return weights


def is_quantised(key: str, last: int) -> bool:
    parts = key.split(".")
    return key.startswith("videodit_blocks.layers.") and parts[-2] in DIVIDED and 0 < int(parts[2]) < last


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("release", RELEASES)
def test_a_release_is_recognised_by_its_shapes(release: str, fp8: bool) -> None:
    weights = on_meta(release, fp8)
    if not fp8:
        count, numbers = TENSORS[release]
        assert len(weights) == count
        assert sum(math.prod(w.shape) for w in weights.values()) == pytest.approx(numbers, rel=1e-4)
    for family in (MAGI, MAGI_DISTILLED):
        found = recognise(weights, "model", family=family.name)
        assert found.family is family
        assert found.release == release
        assert (found.config.heads, found.config.kv_heads, found.config.text_dim) == (RELEASES[release][0] // 128, 8, 4096)
        assert found.config.doubled is found.config.gated is RELEASES[release][4]


def test_base_and_distilled_are_told_apart_by_metadata_or_the_user() -> None:
    weights = on_meta("MAGI-1 4.5B")
    with pytest.raises(ValueError, match="model could be MAGI-1 or MAGI-1 distilled, which have the same shapes: choose one in the input family"):
        recognise(weights, "model")
    assert recognise(weights, "model", {"architecture": "magi-1-distill"}).family is MAGI_DISTILLED
    assert recognise(weights, "model", {"architecture": "magi-1-distill"}, "magi-1").family is MAGI


@pytest.mark.parametrize("family", ["auto", "magi-1"])
def test_layers_in_one_tensor_are_named(family: str) -> None:
    held = {key: tensor for key, tensor in on_meta("MAGI-1 24B").items() if "layers." not in key}
    held["videodit_blocks.layers.self_attention.linear_qkv.weight"] = torch.empty(48, 14336, 6144, device="meta")
    with pytest.raises(ValueError, match=r"net: this is MAGI-1.1, .* use the files of MAGI-1"):
        recognise(held, "net", family=family)


def test_no_family_is_mistaken_for_another() -> None:
    magi, sky = on_meta("MAGI-1 24B"), open_checkpoint(NETWORK).stored
    assert recognise(sky, "sky").family is SKYREELS
    with pytest.raises(ValueError, match=r"magi: this is not a SkyReels-V2 or Wan 2.1 checkpoint: it has no patch_embedding"):
        recognise(magi, "magi", family="skyreels-v2-df")
    with pytest.raises(ValueError, match=r"sky: this is not a whole MAGI-1 checkpoint: it has no videodit_blocks\.layers\.0\."):
        recognise(sky, "sky", family="magi-1")
    wan = {key: weight for key, weight in sky.items() if "fps" not in key}
    assert recognise(wan, "skyreels").family is SKYREELS
    with pytest.raises(ValueError, match="could be MAGI-1 or MAGI-1 distilled"):
        recognise(magi, "magi")


def test_a_family_that_the_nodes_do_not_offer_is_refused_by_name() -> None:
    assert MAGI in FAMILIES
    with pytest.raises(ValueError, match="magi is a MAGI-1 checkpoint: this loader knows SkyReels-V2 diffusion forcing only"):
        checkpoint.recognise(on_meta("MAGI-1 4.5B"), "magi", families=(SKYREELS,))


def test_keys_are_strict_and_wrappers_fall_away() -> None:
    weights = dict(tiny_magi(PLAIN).state_dict())
    wrapped = {**{f"model.diffusion_model.{key}": value for key, value in weights.items()}, "first_stage_model.x": torch.zeros(1)}
    assert set(recognise(wrapped, "net", family="magi-1").names.values()) == weights.keys()
    gone = {key: value for key, value in weights.items() if "layers.1.mlp_post_norm.bias" not in key}
    with pytest.raises(
        ValueError, match=r"net is not a complete MAGI-1 checkpoint: 1 missing \(videodit_blocks.layers.1.mlp_post_norm.bias\) of \d+ keys"
    ):
        recognise(gone, "net", family="magi-1")
    with pytest.raises(ValueError, match=r"1 unknown \(pos\)"):
        recognise({**weights, "pos": torch.zeros(1)}, "net", family="magi-1")


@pytest.mark.parametrize(
    ("key", "shape", "said"),
    [
        ("x_embedder.weight", (64, 20, 1, 2, 2), "it takes 20 channels, and MAGI-1 takes 16, or each of them twice"),
        ("x_embedder.weight", (64, 16), "this is not a whole MAGI-1 checkpoint: x_embedder.weight has shape"),
        ("x_embedder.weight", (72, 16, 1, 2, 2), "a width of 72 with heads of 32 and 1 key heads do not divide"),
        ("videodit_blocks.layers.999.mlp.layer_norm.weight", (1,), "a key names layer 999, and at most 256 are known"),
        ("videodit_blocks.layers.0.self_attention.linear_qkv.k.weight", (96, 64), "heads have to fill the width, in 8 equal parts"),
        ("videodit_blocks.layers.1.self_attention.linear_proj.weight", (64, 64), "linear_proj.weight has shape (64, 64)"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(key: str, shape: tuple[int, ...], said: str) -> None:
    weights = {**tiny_magi(PLAIN).state_dict(), key: torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"^net") as refused:
        recognise(weights, "net", family="magi-1")
    assert said in str(refused.value)


@pytest.mark.parametrize("config", [PLAIN, GATED], ids=["4.5B", "24B"])
def test_a_network_comes_back_from_shards_as_it_was(config: object, tmp_path: Path) -> None:
    weights = tiny_magi(config).state_dict()  # type: ignore[arg-type]
    keys = sorted(weights)
    halves = {f"model-0000{n + 1}-of-00002.safetensors": keys[n::2] for n in range(2)}
    for file, mine in halves.items():
        save_file({key: weights[key] for key in mine}, tmp_path / file, {"architecture": "magi-1-distill"})
    index = {key: file for file, mine in halves.items() for key in mine}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    network = load_network_file(tmp_path)
    assert network.config == config
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 shards are not in .*: model-00002-of-00002.safetensors"):
        load_network_file(tmp_path)


def fp8_of(weights: dict[str, Tensor], last: int) -> dict[str, Tensor]:
    """A checkpoint as the fp8 release stores it: columns multiplied by their scale, then a scale for all, then rounded."""
    out = dict(weights)
    for key in weights:
        if not is_quantised(key, last):
            continue
        layer, columns = key.rpartition(".")[0], weights[key].shape[1]
        smooth = DIVIDED[layer.rpartition(".")[2]] == "smooth"
        divisor = 0.5 + torch.rand(columns) if smooth else torch.full((columns,), 0.7)
        after = torch.tensor([1.0]) if smooth else divisor
        meant = weights[key] * divisor / after[0]
        out[f"{layer}.weight_scale"] = scale = meant.abs().max().reshape(1) / 448
        out[key] = (meant / scale).to(torch.float8_e4m3fn)[None]
        out[f"{layer}.input_scale"] = after
        if smooth:
            out[f"{layer}.smooth_scale"] = divisor[None]
    return out


def quantised_layer(x: Tensor, weights: dict[str, Tensor], layer: str) -> Tensor:
    """As the fp8 kernels have it: the input divided, rounded to fp8, multiplied, and what was divided by put back as one number."""
    after = weights[f"{layer}.input_scale"]
    divisor = weights.get(f"{layer}.smooth_scale", after).flatten()
    rounded = (x / divisor).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    return rounded @ weights[f"{layer}.weight"][0].float().T * after[0] * weights[f"{layer}.weight_scale"]


def test_fp8_weights_are_folded_within_the_rounding_of_the_input(tmp_path: Path) -> None:
    plain = tiny_magi(PLAIN_OF_3).state_dict()
    stored = fp8_of(plain, last=2)
    assert sum(w.dtype in FLOAT8 for w in stored.values()) == len(DIVIDED)
    save_file(stored, tmp_path / "fp8.safetensors", {"architecture": "magi-1-distill"})
    network = load_network_file(tmp_path / "fp8.safetensors", torch.float32)
    folded = network.state_dict()
    assert folded.keys() == plain.keys()
    for key, weight in plain.items():
        if not is_quantised(key, 2):
            assert torch.equal(folded[key], weight)
            continue
        layer = key.removesuffix(".weight")
        torch.testing.assert_close(folded[key], weight, rtol=2**-4, atol=2e-3 * float(weight.abs().max()))
        x = torch.randn(7, weight.shape[1])
        bound = x.abs() @ folded[key].abs().T * 2**-4 + 2**-10 * folded[key].abs().sum(1) * 2
        assert ((quantised_layer(x, stored, layer) - x @ folded[key].T).abs() <= bound).all()


def test_fp8_matrices_whose_columns_count_alike_stay_fp8_and_the_others_are_written_out() -> None:
    stored = fp8_of(tiny_magi(PLAIN_OF_3).state_dict(), last=2)
    plain, scales = unstacked(stored, torch.float32), {"weight_scale"}
    assert {key.rpartition(".")[2] for key in plain if is_companion(key, plain)} == scales
    for key in [key for key, weight in stored.items() if weight.dtype in FLOAT8]:
        layer, wanted = key.rpartition(".")[0], restored(key, stored[key], stored[scale_key(key, stored) or ""], None, column_factors(key, stored))
        smooth = DIVIDED[layer.rpartition(".")[2]] == "smooth"
        assert (plain[key].dtype in FLOAT8) is not smooth
        assert (f"{layer}.weight_scale" in plain) is not smooth
        values = plain[key] if smooth else plain[key].float() * plain[f"{layer}.weight_scale"]
        torch.testing.assert_close(values, wanted)
    sky = open_checkpoint(NETWORK)
    weights = dict(sky.tensors(sky.stored))
    assert all(unstacked(weights, torch.float32)[key] is weight for key, weight in weights.items())


PLAIN_OF_3 = type(PLAIN)(64, 96, 3, 1, head_dim=32, text_dim=12, caption=60)


def test_a_whole_file_may_be_given_as_tensors() -> None:
    weights = tiny_magi(PLAIN).state_dict()
    network = load_network(weights, "net", torch.bfloat16, family="magi-1")
    assert {p.dtype for name, p in network.named_parameters() if name != "rope.bands"} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_bands_are_read_as_they_are_stored_whatever_the_network_computes_in(dtype: torch.dtype, tmp_path: Path) -> None:
    """The released code keeps them in float32. In bfloat16 a band of 0.95 is off by 0.0008: tokens 29 frames apart by 0.023 of a radian."""
    weights = {**tiny_magi(PLAIN).state_dict(), "rope.bands": torch.tensor([0.95, 0.31, 0.123, 0.0111])}
    save_file(weights, tmp_path / "model.safetensors")
    for network in (
        load_network_file(tmp_path, dtype, family="magi-1"),
        load_network(weights, "net", dtype, family="magi-1"),
        load_network(
            {key: weight.to(dtype) for key, weight in weights.items()} | {"rope.bands": weights["rope.bands"]}, "net", dtype, family="magi-1"
        ),
    ):
        assert torch.equal(network.rope.bands, weights["rope.bands"])  # type: ignore[arg-type]
        far = rope_table(network.rope.bands, 29, 1, 1, 1, "cpu")  # type: ignore[arg-type]
        torch.testing.assert_close(far[0, :4].angle(), torch.tensor([math.remainder(29 * band, 2 * math.pi) for band in (0.95, 0.31, 0.123, 0.0111)]))

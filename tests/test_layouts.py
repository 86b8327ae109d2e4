"""Every layout a SkyReels-V2 checkpoint comes in: recognised from its shapes, loaded to the same values, refused when it does not fit together."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowcache_core.models.checkpoint import load_network, load_network_file, recognise
from flowcache_core.models.key_names import original_names
from flowcache_core.models.shards import open_checkpoint
from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2

Weights = dict[str, Tensor]
DIFFUSERS = {
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "fps_projection.0.": "fps_projection.net.0.proj.",
    "fps_projection.2.": "fps_projection.net.2.",
    "head.modulation": "scale_shift_table",
    "head.head.": "proj_out.",
    ".self_attn.": ".attn1.",
    ".cross_attn.": ".attn2.",
    ".q.": ".to_q.",
    ".k.": ".to_k.",
    ".v.": ".to_v.",
    ".o.": ".to_out.0.",
    ".ffn.0.": ".ffn.net.0.proj.",
    ".ffn.2.": ".ffn.net.2.",
    ".norm3.": ".norm2.",
    ".modulation": ".scale_shift_table",
}
"""The renaming of the published converter, written the other way round."""


def diffusers(name: str) -> str:
    for ours, theirs in DIFFUSERS.items():
        name = name.replace(ours, theirs)
    return name


LAYOUTS: dict[str, Callable[[str], str]] = {
    "original": lambda name: name,
    "model.diffusion_model.": lambda name: "model.diffusion_model." + name,
    "diffusion_model.": lambda name: "diffusion_model." + name,
    "diffusers": diffusers,
    "wrapped diffusers": lambda name: "diffusion_model." + diffusers(name),
}


@pytest.fixture
def weights(net: SkyReelsV2) -> Weights:
    return dict(net.state_dict())


def sharded(folder: Path, weights: Weights, count: int = 3, stem: str = "model", index: bool = False) -> Path:
    """A set of `count` shards, with or without an index -> the folder."""
    folder.mkdir(exist_ok=True)
    where = {}
    for number in range(count):
        name = f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {k: v.contiguous() for i, (k, v) in enumerate(sorted(weights.items())) if i % count == number}
        save_file(part, folder / name)
        where.update(dict.fromkeys(part, name))
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def same(network: SkyReelsV2, weights: Weights) -> bool:
    return all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())


RELEASED = {
    "SkyReels-V2-DF 1.3B": (SkyReelsConfig(1536, 8960, 30, fps=True), 830, 1.4355e9),
    "SkyReels-V2-DF 14B": (SkyReelsConfig(5120, 13824, 40), 1095, 14.2885e9),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("release", RELEASED)
def test_the_released_shapes_are_recognised_in_every_layout(release: str, layout: str) -> None:
    config, tensors, parameters = RELEASED[release]
    with torch.device("meta"):
        state = SkyReelsV2(config).state_dict()
    assert len(state) == tensors
    assert sum(v.numel() for v in state.values()) == pytest.approx(parameters, rel=1e-4)
    found = recognise({LAYOUTS[layout](k): v for k, v in state.items()}, "skyreels")
    assert found.config == config
    assert found.release.startswith(release)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fps", [True, False])
def test_every_layout_gives_the_same_values(make_net: Callable[..., SkyReelsV2], tmp_path: Path, layout: str, fps: bool) -> None:
    weights = make_net(fps=fps).state_dict()
    named = {LAYOUTS[layout](k): v for k, v in weights.items()}
    assert len(named) == len(weights)
    save_file(named, tmp_path / "skyreels.safetensors")
    assert same(load_network_file(tmp_path / "skyreels.safetensors"), weights)


def test_the_affine_norm_of_diffusers_is_the_one_before_cross_attention(weights: Weights) -> None:
    assert original_names([*map(diffusers, weights)])["blocks.0.norm2.weight"] == "blocks.0.norm3.weight"


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_folder_and_any_of_its_shards_give_the_whole_network(tmp_path: Path, weights: Weights, layout: str, index: bool) -> None:
    folder = sharded(tmp_path / "skyreels-set", {LAYOUTS[layout](k): v for k, v in weights.items()}, index=index)
    assert same(load_network_file(folder), weights)
    assert same(load_network_file(folder / "model-00002-of-00003.safetensors"), weights)


def test_an_original_folder_with_one_file_is_that_file(tmp_path: Path, weights: Weights) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert same(load_network_file(tmp_path), weights)


def test_shards_that_only_an_index_knows_are_found(tmp_path: Path, weights: Weights) -> None:
    folder = sharded(tmp_path / "skyreels-set", weights, count=2, index=True)
    index = folder / "model.safetensors.index.json"
    for number, name in ((1, "first"), (2, "second")):
        (folder / f"model-{number:05d}-of-00002.safetensors").rename(folder / f"{name}.safetensors")
    index.write_text(index.read_text().replace("model-00001-of-00002", "first").replace("model-00002-of-00002", "second"))
    assert same(load_network_file(folder / "second.safetensors"), weights)


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard_is_named(tmp_path: Path, weights: Weights, index: bool) -> None:
    folder = sharded(tmp_path / "skyreels-set", weights, index=index)
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards are not in skyreels-set: model-00003-of-00003.safetensors; download"):
        open_checkpoint(folder)


def test_a_key_in_two_shards_is_refused(tmp_path: Path, weights: Weights) -> None:
    folder = sharded(tmp_path / "skyreels-set", weights)
    save_file(weights, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"keys \(blocks.0.cross_attn.k.bias, ...\) are both in model-00001-of-00003.* and in model-00003"):
        open_checkpoint(folder)


def test_two_sets_in_one_folder_are_refused_but_a_file_of_one_is_enough(tmp_path: Path, weights: Weights) -> None:
    folder = sharded(tmp_path / "skyreels-set", weights)
    sharded(folder, weights, count=2, stem="other")
    with pytest.raises(ValueError, match=r"set holds shards of 2 models \(model-...-of-00003 and other-...-of-00002\): choose a file"):
        open_checkpoint(folder)
    assert same(load_network_file(folder / "other-00001-of-00002.safetensors"), weights)


def test_a_shard_of_another_width_is_refused_with_the_shapes(tmp_path: Path, weights: Weights) -> None:
    folder = sharded(tmp_path / "skyreels-set", weights)
    with torch.device("meta"):
        wide = {k: v.shape for k, v in SkyReelsV2(SkyReelsConfig(256, 256, 2, 64, fps=True)).state_dict().items()}
    last = sorted(weights)[2::3]
    save_file({k: torch.zeros(wide[k]) for k in last}, folder / "model-00003-of-00003.safetensors")
    with pytest.raises(ValueError, match=r"has shape .* needs .*more keys another shape: are the files of one model\?"):
        load_network_file(folder)


@pytest.mark.parametrize("change", ["drop", "add"])
def test_shards_that_do_not_match_their_index_are_refused(tmp_path: Path, weights: Weights, change: str) -> None:
    folder = sharded(tmp_path / "skyreels-set", weights, count=1, index=True)
    changed = {k: v for k, v in weights.items() if k != "head.head.bias"} if change == "drop" else {**weights, "more": torch.zeros(1)}
    save_file(changed, folder / "model-00001-of-00001.safetensors")
    said = r"lack 1 keys of their index \(head.head.bias" if change == "drop" else r"hold 1 keys their index lacks \(more"
    with pytest.raises(ValueError, match=said):
        open_checkpoint(folder)


@pytest.mark.parametrize(("files", "said"), [((), "no safetensors file"), (("a", "b"), "2 safetensors files that are no shards")])
def test_a_folder_without_one_model_is_refused(tmp_path: Path, files: tuple[str, ...], said: str) -> None:
    for name in files:
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=said):
        open_checkpoint(tmp_path)


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"net.pth is no safetensors file"):
        open_checkpoint(tmp_path / "net.pth")


def test_sizes_of_the_small_release_without_its_frame_rate_are_refused() -> None:
    with torch.device("meta"):
        state = SkyReelsV2(SkyReelsConfig(1536, 8960, 30)).state_dict()
    with pytest.raises(ValueError, match="but not its frame-rate tensors"):
        recognise(state, "wan")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_files_load_to_their_rounded_values(tmp_path: Path, weights: Weights, dtype: torch.dtype) -> None:
    rounded = {k: v.to(dtype) if v.ndim == 2 else v for k, v in weights.items()}
    save_file(rounded, tmp_path / "skyreels.safetensors")
    assert same(load_network_file(tmp_path / "skyreels.safetensors", torch.float32), {k: v.float() for k, v in rounded.items()})


@pytest.mark.parametrize("convention", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("layout", ["original", "model.diffusion_model.", "diffusers"])
def test_scaled_fp8_files_load_close_to_the_weights(tmp_path: Path, weights: Weights, layout: str, convention: str) -> None:
    scaled: Weights = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if convention == "scale_weight" else {}
    for key, value in weights.items():
        if value.ndim == 2 and key.startswith("blocks."):
            scale = value.abs().max() / 448
            scaled[LAYOUTS[layout](key)] = (value / scale).to(torch.float8_e4m3fn)
            scaled[LAYOUTS[layout](key.replace(".weight", f".{convention}"))] = scale
        else:
            scaled[LAYOUTS[layout](key)] = value
    save_file(scaled, tmp_path / "skyreels.safetensors")
    for network in (load_network_file(tmp_path / "skyreels.safetensors", torch.float32), load_network(scaled, "net", torch.float32)):
        for key, value in network.state_dict().items():
            assert (value - weights[key]).abs().max() <= weights[key].abs().max() / 16


def test_weights_that_only_the_host_can_read_are_refused(tmp_path: Path, weights: Weights) -> None:
    key = "blocks.0.ffn.0.weight"
    save_file({**weights, key: weights[key].to(torch.int8), key.replace("weight", "weight_scale"): torch.ones(1)}, tmp_path / "skyreels.safetensors")
    with pytest.raises(ValueError, match=r"blocks.0.ffn.0.weight is quantised as int8"):
        load_network_file(tmp_path / "skyreels.safetensors", torch.float32)


PEAK = """
import sys, torch
from flowcache_core.models.checkpoint import load_network_file

def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
network = load_network_file(sys.argv[1], getattr(torch, sys.argv[2]))
touched = sum(int(p.data.view(torch.uint8).flatten()[::2048].sum()) for p in network.parameters())
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_shard_by_shard_needs_no_more_memory_than_the_files(tmp_path: Path, dtype: str) -> None:
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in SkyReelsV2(SkyReelsConfig(768, 3072, 5, 256)).state_dict().items()}
    folder = sharded(tmp_path / "skyreels-set", {k: torch.zeros(shape) for k, shape in shapes.items()}, count=8)
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size > 190 << 20
    command = [sys.executable, "-c", PEAK, str(folder), dtype]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 1.2 * size
    assert int(done.stdout) >= 0.5 * size

"""Checkpoint files: what fits is loaded, what does not is refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowcache_core.models.checkpoint import load_network, read, recognise
from flowcache_core.models.key_names import PREFIXES
from flowcache_core.models.skyreels import SkyReelsV2


@pytest.fixture
def weights(net: SkyReelsV2) -> dict[str, Tensor]:
    return dict(net.state_dict())


def test_a_network_comes_back_from_a_file_as_it_was(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    save_file(weights, tmp_path / "net.safetensors", {"chunk_frames": "3"})
    tensors, metadata = read(tmp_path / "net.safetensors")
    again = load_network(tensors, "net", torch.float32)
    assert metadata["chunk_frames"] == "3"
    assert again.state_dict().keys() == weights.keys()
    assert all(torch.equal(v, weights[k]) for k, v in again.state_dict().items())
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())


def test_loading_can_change_the_dtype(weights: dict[str, Tensor]) -> None:
    net = load_network(weights, "net", torch.bfloat16)
    assert net.dtype == torch.bfloat16
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrapped_key_names_lose_their_prefix_and_foreign_keys_go(prefix: str, weights: dict[str, Tensor]) -> None:
    wrapped = {**{prefix + k: v for k, v in weights.items()}, "first_stage_model.x": torch.zeros(1)}
    assert set(recognise(wrapped, "net").names.values()) == weights.keys()


def test_plain_key_names_stay(weights: dict[str, Tensor]) -> None:
    assert recognise(weights, "net").names == {key: key for key in weights}


def test_matrices_are_the_weights_of_linear_layers(weights: dict[str, Tensor]) -> None:
    matrices = recognise(weights, "net").matrices
    assert matrices == {key for key, weight in weights.items() if weight.ndim == 2 and key.endswith(".weight")} - {"fps_embedding.weight"}
    assert "fps_embedding.weight" in weights


def test_a_missing_key_is_named(weights: dict[str, Tensor]) -> None:
    del weights["blocks.1.norm3.bias"]
    with pytest.raises(ValueError, match=r"net is not a complete .* checkpoint: 1 missing \(blocks.1.norm3.bias\) of \d+ keys"):
        recognise(weights, "net")


def test_an_unknown_key_is_named(weights: dict[str, Tensor]) -> None:
    weights.update({f"rope.{i}": torch.zeros(1) for i in range(4)})
    with pytest.raises(ValueError, match=r"4 unknown \(rope.0, rope.1, rope.2, ...\)"):
        recognise(weights, "net")


def test_a_wrong_shape_is_named_with_both_shapes(weights: dict[str, Tensor]) -> None:
    weights["blocks.0.self_attn.q.weight"] = torch.zeros(128, 64)
    with pytest.raises(ValueError, match=r"blocks.0.self_attn.q.weight has shape \(128, 64\), but a network of width 128 needs \(128, 128\)"):
        load_network(weights, "net", torch.float32)


def test_another_network_is_refused_by_name(weights: dict[str, Tensor]) -> None:
    known = "SkyReels-V2 diffusion forcing, MAGI-1, .* or Krea Realtime"
    with pytest.raises(ValueError, match=f"other: this is not a checkpoint of {known}: it has conv.weight"):
        recognise({"conv.weight": torch.zeros(1)}, "other")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("img_emb.proj.0.bias", "an image-to-video or control checkpoint"),
        ("blocks.0.cross_attn.k_img.weight", "an image-to-video or control checkpoint"),
        ("blocks.0.self_attn.q.lora_A.weight", "a LoRA: put it into models/loras"),
        ("vace_blocks.0.norm3.bias", "a VACE checkpoint"),
        ("encoder.block.0.layer.0.layer_norm.weight", "a T5 text encoder"),
        ("token_embedding.weight", "a text encoder under names that Load CLIP does not read: use umt5_xxl_fp16"),
    ],
)
def test_a_file_of_another_model_is_refused_by_name(key: str, said: str, weights: dict[str, Tensor]) -> None:
    weights[key] = torch.zeros(1)
    with pytest.raises(ValueError, match=f"net is {said}"):
        recognise(weights, "net")


def test_more_channels_in_than_out_are_refused_as_image_to_video(weights: dict[str, Tensor]) -> None:
    weights["patch_embedding.weight"] = torch.zeros(128, 36, 1, 2, 2)
    with pytest.raises(ValueError, match="it takes 36 channels and gives 16"):
        recognise(weights, "net")


@pytest.mark.parametrize("family", ["auto", "skyreels-v2-df", "self-forcing"])
def test_latents_of_another_vae_are_refused(family: str, weights: dict[str, Tensor]) -> None:
    """Wan 2.2 5B, and LongLive 2.0, which is made from it."""
    weights["patch_embedding.weight"] = torch.zeros(128, 48, 1, 2, 2)
    weights |= {"head.head.weight": torch.zeros(192, 128), "head.head.bias": torch.zeros(192)}
    with pytest.raises(ValueError, match=r"takes latents of 48 channels, .* LongLive 2.0, which is not supported"):
        recognise(weights, "net", family=family)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*gone.safetensors"):
        read(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, 0.999])
def test_a_truncated_file_is_refused_with_its_size(tmp_path: Path, weights: dict[str, Tensor], keep: float) -> None:
    path = tmp_path / "cut.safetensors"
    save_file(weights, path)
    whole = path.read_bytes()
    size = int(keep if keep >= 1 or keep == 0 else keep * len(whole))
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=rf"cut.safetensors \({size} bytes\) is not a whole safetensors file: .*; download it again"):
        read(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.safetensors"
    path.write_text("<html>not found</html>" * 50)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        read(path)

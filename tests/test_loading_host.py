"""Model files, LoRAs and the memory estimate in a real ComfyUI. COMFYUI_GGUF may name the folder of the ComfyUI-GGUF pack."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowcache_core.device import fast_dtype
from flowcache_core.models import bundle
from flowcache_core.models.shards import open_checkpoint
from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from flowcache_core.models.wan_vae import normalise
from flowcache_core.run.generate import generate
from tests.host import NEEDS_HOST, PACK, Graph, Host, HostJob, after_loader, error_of, node, put, refused, small, without_cache
from tests.test_layouts import diffusers, sharded

pytestmark = NEEDS_HOST
Weights = dict[str, Tensor]
GGUF = os.environ.get("COMFYUI_GGUF")
KEY = "blocks.0.self_attn.q.weight"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("comfy")
    for folder in ("models/diffusion_models", "models/loras", "models/vae", "custom_nodes"):
        (base / folder).mkdir(parents=True)
    if GGUF:
        (base / "custom_nodes" / "ComfyUI-GGUF").symlink_to(Path(GGUF).absolute(), target_is_directory=True)
    with Host(base) as running:
        yield running


@pytest.fixture(scope="module")
def models(host: Host) -> Path:
    return host.base / "models" / "diffusion_models"


@pytest.fixture
def weights() -> Weights:
    """A small network, float32, that takes the text embeddings of the bundled CLIP."""
    torch.manual_seed(0)
    width = open_checkpoint(bundle.NETWORK).stored["text_embedding.0.weight"].shape[1]
    network = SkyReelsV2(SkyReelsConfig(128, 256, 2, width, fps=True))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return dict(network.state_dict())


@pytest.fixture
def graph() -> Graph:
    """One chunk of 17 frames, 3 steps, no cache; the model is loaded by node "1"."""
    whole = json.loads((PACK / "workflows" / "api" / "text_to_video.json").read_text())
    return put(without_cache(small(whole, steps=3, length=17)), "CFGGuider", cfg=3.0)


def with_model(graph: Graph, name: str, kind: str = "FlowCacheLoadModel", **inputs: Any) -> Graph:
    """The graph with another MODEL; CLIP and VAE stay those of the bundled one."""
    out, loader = copy.deepcopy(graph), node(graph, "FlowCacheLoadModel")
    for one in out.values():
        one["inputs"] = {k: ["other", 0] if v == [loader, 0] else v for k, v in one["inputs"].items()}
    out["other"] = {"class_type": kind, "inputs": inputs or {"model_name": name}}
    return out


def with_lora(graph: Graph, name: str, strength: float = 1.0) -> Graph:
    out = copy.deepcopy(graph)
    out[node(out, "CFGGuider")]["inputs"]["model"] = ["lora", 0]
    source = graph[node(graph, "CFGGuider")]["inputs"]["model"]
    out["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": {"model": source, "lora_name": name, "strength_model": strength}}
    return out


def near(film: Tensor, wanted: Tensor) -> bool:
    """Equal but for rounding, which on a processor depends on how a file happens to be aligned."""
    return bool((film - wanted).abs().max() <= 1e-4 * wanted.abs().max())


def log_of(host: Host) -> str:
    return host.log.read_text(errors="replace")


def rounded(weights: Weights, dtype: torch.dtype) -> Weights:
    return {k: v.to(dtype) if v.ndim == 2 and k.startswith("blocks.") else v for k, v in weights.items()}


def scaled(weights: Weights) -> tuple[Weights, Weights, Weights]:
    """fp8 values, their scales by layer, and what the two mean."""
    values, scales, meant = {}, {}, {}
    for key, value in weights.items():
        values[key] = meant[key] = value
        if value.ndim == 2 and key.startswith("blocks."):
            scale = value.abs().max() / 448
            values[key], scales[key.removesuffix(".weight")] = (value / scale).to(torch.float8_e4m3fn), scale
            meant[key] = values[key].float() * scale
    return values, scales, meant


def test_a_file_its_shards_and_its_diffusers_twin_give_the_same_film(host: Host, models: Path, graph: Graph, weights: Weights) -> None:
    save_file(weights, models / "one.safetensors")
    save_file({f"model.diffusion_model.{k}": v for k, v in weights.items()}, models / "wrapped.safetensors")
    sharded(models / "set", weights, index=True)
    (models / "twin").mkdir()
    sharded(models / "twin" / "transformer", {diffusers(k): v for k, v in weights.items()}, count=2, stem="diffusion_pytorch_model")
    offered = host.ask("/object_info/FlowCacheLoadModel")["FlowCacheLoadModel"]["input"]["required"]["model_name"]
    offered = offered[1]["options"] if offered[0] == "COMBO" else offered[0]
    names = ["wrapped.safetensors", "set/", "set/model-00002-of-00003.safetensors", "twin/transformer/"]
    assert {"one.safetensors", *names} <= set(offered)
    assert offered[0].endswith("(bundled)")
    first = host.latents(with_model(graph, "one.safetensors"))
    assert torch.isfinite(first).all()
    for name in names:
        assert near(host.latents(with_model(graph, name)), first), name
    assert "set/ is 2 layers of width 128, with frame rate, 3 files" in log_of(host)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_fp8_stays_fp8_and_gives_what_its_values_give(host: Host, models: Path, graph: Graph, weights: Weights, dtype: torch.dtype) -> None:
    kind = str(dtype).removeprefix("torch.")
    narrow = rounded(weights, dtype)
    save_file(narrow, models / f"{kind}.safetensors")
    save_file({k: v.float() for k, v in narrow.items()}, models / f"{kind}_wide.safetensors")
    film = host.latents(with_model(graph, f"{kind}.safetensors"))
    assert f"model weight dtype {dtype}, manual cast: torch.float32" in log_of(host)
    assert near(film, host.latents(with_model(graph, f"{kind}_wide.safetensors")))


@pytest.mark.parametrize("convention", ["scale_weight", "unmarked", "metadata", "comfy_quant", "diffusers"])
def test_scaled_fp8_gives_what_its_values_mean(host: Host, models: Path, graph: Graph, weights: Weights, convention: str) -> None:
    values, scales, meant = scaled(weights)
    suffix = "scale_weight" if convention in ("scale_weight", "unmarked") else "weight_scale"
    values.update({f"{layer}.{suffix}": scale for layer, scale in scales.items()})
    layers = {layer: {"format": "float8_e4m3fn"} for layer in scales}
    metadata = {"format": "pt"}
    if convention == "scale_weight":
        values["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    if convention == "comfy_quant":
        values.update({f"{k}.comfy_quant": torch.tensor(list(json.dumps(v).encode()), dtype=torch.uint8) for k, v in layers.items()})
    if convention == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    if convention == "diffusers":
        values = {diffusers(k): v for k, v in values.items()}
        metadata["_quantization_metadata"] = json.dumps({"layers": {diffusers(f"{k}.").removesuffix("."): v for k, v in layers.items()}})
    save_file(values, models / f"{convention}.safetensors", metadata)
    save_file(meant, models / f"{convention}_meant.safetensors")
    film, wanted = (host.latents(with_model(graph, f"{convention}{end}.safetensors")) for end in ("", "_meant"))
    assert (film - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    assert "Using mixed precision operations" in log_of(host)


def lora_file(
    path: Path, layers: dict[str, tuple[int, int]], up: str = "lora_up", down: str = "lora_down", metadata: dict[str, str] | None = None
) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer, (out, into) in layers.items():
        tensors[f"{layer}.{up}.weight"] = torch.randn(out, 4, generator=generator)
        tensors[f"{layer}.{down}.weight"] = torch.randn(4, into, generator=generator) / 20
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("precision", ["float32", "fp8"])
def test_a_lora_in_every_wan_format_changes_the_film_alike(host: Host, models: Path, graph: Graph, weights: Weights, precision: str) -> None:
    loras = host.base / "models" / "loras"
    save_file(weights if precision == "float32" else rounded(weights, torch.float8_e4m3fn), models / f"lora_{precision}.safetensors")
    base = with_model(graph, f"lora_{precision}.safetensors")
    plain = host.latents(base)
    formats = {
        "native": ("diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.1.ffn.0", "lora_B", "lora_A"),
        "kohya": ("lora_unet_blocks_0_self_attn_q", "lora_unet_blocks_1_ffn_0", "lora_up", "lora_down"),
        "up_down": ("diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.1.ffn.0", "lora_up", "lora_down"),
    }
    films = []
    for name, (first, second, up, down) in formats.items():
        lora_file(loras / f"{name}.safetensors", {first: (128, 128), second: (256, 128)}, up, down, {"format": "pt"})
        films.append(host.latents(with_lora(base, f"{name}.safetensors")))
    assert not torch.equal(films[0], plain)
    assert all(torch.equal(film, films[0]) for film in films)
    assert torch.equal(host.latents(base), plain)


def test_a_lora_on_the_bundled_model_changes_the_film(host: Host, graph: Graph) -> None:
    width = open_checkpoint(bundle.NETWORK).stored[KEY].shape[0]
    lora_file(host.base / "models" / "loras" / "own.safetensors", {"diffusion_model.blocks.0.self_attn.q": (width, width)})
    assert not torch.equal(host.latents(with_lora(graph, "own.safetensors")), host.latents(graph))


def test_a_lora_for_another_size_is_refused_before_sampling(host: Host, graph: Graph) -> None:
    lora_file(host.base / "models" / "loras" / "wide.safetensors", {"diffusion_model.blocks.0.self_attn.q": (5120, 5120)})
    refused(host, with_lora(graph, "wide.safetensors"), r"1 layers of the LoRA do not fit, such as blocks.0.self_attn.q.weight: .*\(5120, 5120\)")


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None])
def test_a_lora_of_another_kind_is_refused(host: Host, graph: Graph, metadata: dict[str, str] | None) -> None:
    lora_file(host.base / "models" / "loras" / "flux.safetensors", {"lora_unet_double_blocks_0_img_attn_qkv": (9, 3)}, metadata=metadata)
    refused(host, with_lora(graph, "flux.safetensors"), "none of the LoRA's layers is in this model")
    assert "lora key not loaded" in log_of(host)


def test_a_lora_of_another_kind_beside_one_that_fits_is_refused(host: Host, graph: Graph) -> None:
    width = open_checkpoint(bundle.NETWORK).stored[KEY].shape[0]
    lora_file(host.base / "models" / "loras" / "flux.safetensors", {"lora_unet_double_blocks_0_img_attn_qkv": (9, 3)})
    lora_file(host.base / "models" / "loras" / "own.safetensors", {"diffusion_model.blocks.0.self_attn.q": (width, width)})
    both = after_loader(with_lora(graph, "own.safetensors"), "LoraLoaderModelOnly", lora_name="flux.safetensors", strength_model=1.0)
    refused(host, both, "none of the LoRA's layers is in this model")


def test_the_bundled_model_is_computed_in_the_dtype_that_suits_the_machine(host: Host, graph: Graph) -> None:
    made = put(put(graph, "FlowCacheLatent", width=64, height=64), "RandomNoise", noise_seed=4)
    film, kind = normalise(host.latents(made)), fast_dtype()
    assert f"tiny-skyreels (bundled) is computed in {str(kind).removeprefix('torch.')} on cpu" in log_of(host)
    text, negative = (made[made[node(made, "CFGGuider")]["inputs"][end][0]]["inputs"]["text"] for end in ("positive", "negative"))
    ours, _ = generate(bundle.load_bundle(kind), HostJob(text, frames=21, steps=3, seed=4, size=64, negative=negative))
    assert (film - ours).square().mean() < 1e-3 * ours.square().mean()


def test_another_dtype_of_computation_is_no_lora(host: Host, graph: Graph) -> None:
    once = after_loader(graph, "ModelComputeDtype", dtype="fp32")
    assert torch.isfinite(host.latents(once)).all()
    twice = {**put(once, "ModelComputeDtype", model=["first", 0]), "first": once["extra"]}
    refused(host, twice, "it is a ModelComputeDtype with the dtype that the MODEL has already, or a LoRA of which")


def test_a_damaged_weight_is_named(host: Host, models: Path, graph: Graph, weights: Weights) -> None:
    broken = {key: weight.clone() for key, weight in weights.items()}
    broken["blocks.1.ffn.2.weight"][3, 4] = float("nan")
    save_file(broken, models / "nan.safetensors")
    refused(host, with_model(graph, "nan.safetensors"), r"blocks\.1\.ffn\.2\.weight holds such values\. The file is damaged")


def test_what_does_not_belong_together_is_refused(host: Host, models: Path, graph: Graph, weights: Weights) -> None:
    sharded(models / "holes", weights)
    (models / "holes" / "model-00001-of-00003.safetensors").unlink()
    refused(host, with_model(graph, "holes/"), "1 of 3 shards are not in holes: model-00001-of-00003.safetensors")
    save_file({**weights, "img_emb.proj.0.bias": torch.zeros(1)}, models / "i2v.safetensors")
    refused(host, with_model(graph, "i2v.safetensors"), "i2v.safetensors is an image-to-video or control checkpoint")
    save_file({k: v for k, v in weights.items() if k != KEY}, models / "lacks.safetensors")
    refused(host, with_model(graph, "lacks.safetensors"), f"1 missing \\({KEY}\\)")


def test_what_the_run_will_hold_is_told_before_and_is_what_it_holds(host: Host, graph: Graph) -> None:
    for cfg in (1.0, 3.0):
        done = host.run(put(graph, "CFGGuider", cfg=cfg))
        assert done["status"]["status_str"] == "success", error_of(done)
        text = done["outputs"][node(graph, "FlowCacheReport")]["text"][0]
        found = re.search(r"at its peak the run holds weights \S+ \S+, KV cache (\S+) (\S+), .*\n.*KV peak (\S+) (\S+)", text)
        assert found, text
        assert found[1] == found[3]
        assert found[0] in text
        assert log_of(host).count(f"FlowCache: {found[0].splitlines()[0]}") >= 1
        assert float(found[1]) > 0


def test_the_frame_rate_of_a_model_without_one_is_refused(host: Host, models: Path, graph: Graph, weights: Weights) -> None:
    save_file({k: v for k, v in weights.items() if not k.startswith("fps_")}, models / "skyreels_no_fps.safetensors")
    base = with_model(graph, "skyreels_no_fps.safetensors")
    assert torch.isfinite(host.latents(base)).all()
    refused(host, put(base, "FlowCacheSampler", fps="16"), "fps 16 would change nothing, this model has no frame-rate tensors")


def test_a_stock_wan_model_is_refused_by_name(host: Host, models: Path, graph: Graph) -> None:
    wan = {k: torch.zeros_like(v) for k, v in SkyReelsV2(SkyReelsConfig(128, 256, 1)).state_dict().items()}
    save_file(wan, models / "stock.safetensors")
    stock = with_model(graph, "", "UNETLoader", unet_name="stock.safetensors", weight_dtype="default")
    stock[node(stock, "FlowCacheLatent")]["inputs"]["model"] = [node(graph, "FlowCacheLoadModel"), 0]
    refused(host, stock, "AR Chunk Sampler cannot serve a WAN21 model: load it with the Load AR Video Model node")
    whole = json.loads((PACK / "workflows" / "api" / "text_to_video.json").read_text())
    cached = with_model(whole, "", "UNETLoader", unet_name="stock.safetensors", weight_dtype="default")
    refused(host, cached, "cannot serve a WAN21 model")


def test_the_stock_vae_loader_opens_the_bundled_vae(host: Host, graph: Graph) -> None:
    (host.base / "models" / "vae" / "tiny.safetensors").write_bytes(bundle.VAE.read_bytes())
    stock = {**copy.deepcopy(graph), "vae": {"class_type": "VAELoader", "inputs": {"vae_name": "tiny.safetensors"}}}
    stock[node(stock, "VAEDecode")]["inputs"]["vae"] = ["vae", 0]
    done = host.run(stock)
    assert done["status"]["status_str"] == "success", error_of(done)
    assert done["outputs"][node(graph, "SaveVideo")]


@pytest.mark.skipif(bool(GGUF), reason="the pack is installed")
def test_a_gguf_file_without_its_pack_names_the_pack(host: Host, models: Path, graph: Graph) -> None:
    (models / "net.gguf").write_bytes(b"GGUF")
    refused(host, with_model(graph, "net.gguf"), "net.gguf is a GGUF file, which ComfyUI-GGUF reads: install that node pack")


WRITE = """
import sys, gguf, numpy, torch
from safetensors.torch import load_file, save_file

weights, meant = load_file(sys.argv[1]), {}
writer = gguf.GGUFWriter(sys.argv[2], "wan")
for key, value in weights.items():
    array = meant[key] = value.numpy()
    if value.ndim == 2 and key.startswith("blocks."):
        packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(key, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        meant[key] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    elif value.ndim == 5:
        writer.add_array("comfy.gguf.orig_shape." + key, list(array.shape))
        writer.add_tensor(key, array.reshape(array.shape[0], -1))
    else:
        writer.add_tensor(key, array)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
save_file({k: torch.from_numpy(numpy.ascontiguousarray(v)) for k, v in meant.items()}, sys.argv[3])
"""


@pytest.mark.skipif(not GGUF, reason="set COMFYUI_GGUF to the folder of the ComfyUI-GGUF pack")
def test_a_gguf_file_gives_what_its_values_mean_and_takes_a_lora(host: Host, models: Path, graph: Graph, weights: Weights, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "net.safetensors")
    files = [str(tmp_path / "net.safetensors"), str(models / "net.gguf"), str(models / "meant.safetensors")]
    subprocess.run([os.environ["COMFYUI_PYTHON"], "-c", WRITE, *files], check=True)
    film, wanted = (host.latents(with_model(graph, name)) for name in ("net.gguf", "meant.safetensors"))
    assert (film - wanted).abs().max() <= 1e-2 * wanted.abs().max()
    lora_file(host.base / "models" / "loras" / "gguf.safetensors", {"diffusion_model.blocks.0.self_attn.q": (128, 128)})
    changed, same = (host.latents(with_lora(with_model(graph, name), "gguf.safetensors")) for name in ("net.gguf", "meant.safetensors"))
    assert not torch.equal(changed, film)
    assert (changed - same).abs().max() <= 1e-2 * same.abs().max()

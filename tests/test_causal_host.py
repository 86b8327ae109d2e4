"""Causal Wan models in a real ComfyUI: loaded as published, as the host's own model, and sampled by its sampler and by ours to the same film."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores.even import Even
from flowcache_core.kv.scores.salience import Salience
from flowcache_core.models.bundle import Bundle, load_bundle
from flowcache_core.models.causal_wan_family import CAUSVID, FRAMEWISE, SELF_FORCING
from flowcache_core.models.family import Family
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.wan_vae import normalise
from flowcache_core.models.word_text import encode_prompt
from flowcache_core.run.generate import Job, generate
from tests.host import NEEDS_HOST, Graph, Host, error_of, put, with_nodes
from tests.tiny_causal import PUBLISHED, TO_HOST, tiny_causal

pytestmark = NEEDS_HOST
FILE, REPACK, LONE, LORA, KOHYA = "self_forcing.pt", "repack.safetensors", "lone.safetensors", "lora.pt", "kohya.safetensors"
WAN_FUN, DIFFUSERS, CHANGES = "wan_fun.safetensors", "diffusers.safetensors", "changes.safetensors"
MINE = "diffusion_model."
TEXT_DIM = 256
"""That of the CLIP that comes with the bundled model."""
LORA_LAYERS = ("blocks.0.self_attn.q", "blocks.1.cross_attn.v")
TEXT, NEGATIVE = "red circle moves right", "blue"
KINDS = '''
"""What a MODEL is."""
import json, os
import folder_paths

class Kinds:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "run", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "name": ("STRING",)}}

    def run(self, model, name):
        names = [[one.__name__ for one in type(thing).__mro__] for thing in (model.model, model.model.diffusion_model)]
        with open(os.path.join(folder_paths.get_output_directory(), name), "w") as file:
            json.dump([*names, list(model.model.diffusion_model.state_dict())], file)
        return ()

NODE_CLASS_MAPPINGS = {"TestKinds": Kinds}
'''


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("comfy")
    folder = base / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    (base / "models" / "loras").mkdir()
    weights = tiny_causal(text_dim=TEXT_DIM).state_dict()
    torch.save(PUBLISHED["training state"](weights), folder / FILE)
    save_file(weights, folder / REPACK, TO_HOST)
    save_file(weights, folder / LONE)
    torch.save(longlive_lora(), base / "models" / "loras" / LORA)
    save_file(kohya(longlive_lora()["generator_lora"]), base / "models" / "loras" / KOHYA)
    save_file(
        {key.replace("lora_unet_", "lora_unet__"): value for key, value in kohya(longlive_lora()["generator_lora"]).items()},
        base / "models" / "loras" / WAN_FUN,
    )
    save_file(by_diffusers(longlive_lora()["generator_lora"]), base / "models" / "loras" / DIFFUSERS)
    torch.save(
        {"generator_lora": {"base_model.model.blocks.9.self_attn.q.lora_A.weight": torch.zeros(2, 256)}}, base / "models" / "loras" / "other.pt"
    )
    save_file(differences(), base / "models" / "loras" / CHANGES)
    save_file({**differences(), f"{MINE}blocks.0.diff_m": torch.zeros(1, 6, 256)}, base / "models" / "loras" / "modulated.safetensors")
    save_file({f"{MINE}blocks.0.norm3.diff": torch.zeros(128)}, base / "models" / "loras" / "narrow.safetensors")
    with with_nodes(base, KINDS, ("--fp32-unet",)) as running:
        yield running


def longlive_lora() -> dict[str, dict[str, Tensor]]:
    """As LongLive publishes it: of the generator and of the critic, as PEFT names them."""
    generator = torch.Generator().manual_seed(11)
    parts: dict[str, Tensor] = {}
    for layer in LORA_LAYERS:
        parts[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(4, 256, generator=generator) * 0.2
        parts[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(256, 4, generator=generator) * 0.2
    return {"generator_lora": parts, "critic_lora": {key: value * 7 for key, value in parts.items()}}


def differences() -> dict[str, Tensor]:
    """As lightx2v writes them: what changes of weights and biases, whole."""
    generator, weights = torch.Generator().manual_seed(8), tiny_causal(text_dim=TEXT_DIM).state_dict()
    ends = {"blocks.0.norm3.diff": "weight", "blocks.0.norm3.diff_b": "bias", "blocks.1.self_attn.q.diff_b": "bias"}
    return {f"{MINE}{key}": torch.randn(weights[f"{key.rpartition('.')[0]}.{of}"].shape, generator=generator) * 0.3 for key, of in ends.items()}


def with_differences() -> SkyReelsV2:
    """The network with them in its weights."""
    network, of = tiny_causal(text_dim=TEXT_DIM), {"diff": "weight", "diff_b": "bias"}
    for key, change in differences().items():
        layer, _, kind = key.removeprefix(MINE).rpartition(".")
        getattr(network.get_submodule(layer), of[kind]).data.add_(change)
    return network


def kohya(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same as kohya writes it, with the rank as alpha."""
    out: dict[str, Tensor] = {}
    for key, weight in lora.items():
        layer, _, which = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        name = f"lora_unet_{layer.replace('.', '_')}"
        out[f"{name}.lora_{'down' if which == 'A' else 'up'}.weight"] = weight
        out[f"{name}.alpha"] = torch.tensor(4.0)
    return out


def by_diffusers(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of Diffusers' layers."""
    parts = {
        "base_model.model.": "transformer.",
        "self_attn.": "attn1.",
        "cross_attn.": "attn2.",
        "ffn.0.": "ffn.net.0.proj.",
        "ffn.2.": "ffn.net.2.",
    }
    parts |= {f".{one}.lora": f".to_{one}.lora" for one in "qkv"} | {".o.lora": ".to_out.0.lora"}
    for ours, theirs in parts.items():
        lora = {key.replace(ours, theirs): weight for key, weight in lora.items()}
    return lora


def with_longlive() -> SkyReelsV2:
    """The network with the LoRA in its weights."""
    network, parts = tiny_causal(text_dim=TEXT_DIM), longlive_lora()["generator_lora"]
    for layer in LORA_LAYERS:
        down, up = (parts[f"base_model.model.{layer}.lora_{which}.weight"] for which in "AB")
        network.get_submodule(layer).weight += up @ down
    return network


def linked(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture
def graph() -> Graph:
    """Three chunks of three latent frames, by our sampler."""
    return {
        "model": linked("FlowCacheLoadModel", model_name=FILE, family="self-forcing"),
        "words": linked("FlowCacheLoadModel", model_name="tiny-skyreels (bundled)", family="auto"),
        "text": linked("CLIPTextEncode", clip=["words", 1], text=TEXT),
        "no": linked("CLIPTextEncode", clip=["words", 1], text=NEGATIVE),
        "latent": linked("FlowCacheLatent", model=["model", 0], width=64, height=64, length=33, unit="frames", snap="off", batch_size=1),
        "guider": linked("CFGGuider", model=["model", 0], positive=["text", 0], negative=["no", 0], cfg=1.0),
        "noise": linked("RandomNoise", noise_seed=7),
        "sigmas": linked("FlowCacheScheduler", model=["model", 0], steps=4, shift=0.0, denoise=1.0),
        "sampler": linked("FlowCacheSampler", solver="auto", ar_step=-1, chunk_frames=0, window=0, fps="auto", addnoise_condition=-1),
        "film": linked("SamplerCustomAdvanced", noise=["noise", 0], guider=["guider", 0], sampler=["sampler", 0], sigmas=["sigmas", 0],
                       latent_image=["latent", 0]),
    }  # fmt: skip


def by_host(graph: Graph, frames: int = 3) -> Graph:
    return {**graph, "sampler": linked("SamplerARVideo", num_frame_per_block=frames)}


def refusal(host: Host, graph: Graph) -> str:
    done = host.run({**graph, "save": linked("SaveLatent", samples=["film", 0], filename_prefix="refused")})
    assert done["status"]["status_str"] == "error"
    return error_of(done)


class Words(Bundle):
    """With the words of the bundled model."""

    def text(self, prompt: str) -> Tensor:
        return encode_prompt(prompt, TEXT_DIM)


def alone(family: Family = SELF_FORCING, network: SkyReelsV2 | None = None, compressor: Compressor | None = None, **changes: Any) -> Tensor:
    """The film without a host."""
    bundle = Words(family, network or tiny_causal(text_dim=TEXT_DIM), nn.Identity(), family.layout)
    job = Job.usual(family, TEXT, **{"frames": 33, "seed": 7, "size": 64, "negative": NEGATIVE, **changes})
    return generate(bundle, job, compressor=compressor)[0]


def close(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert float(other.std()) > 0.1
    torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-3)


def test_our_sampler_and_the_hosts_make_the_film_that_is_made_without_a_host(host: Host, graph: Graph) -> None:
    ours, theirs = host.latents(graph), host.latents(by_host(graph))
    close(ours, theirs)
    close(normalise(ours), alone())
    assert torch.equal(ours, host.latents(graph))
    assert torch.equal(theirs, host.latents(by_host(graph)))


@pytest.mark.parametrize("name", [FILE, REPACK, LONE])
def test_a_file_is_loaded_as_the_hosts_own_causal_model(host: Host, graph: Graph, name: str) -> None:
    kinds = {"model": put(graph, "RandomNoise")["model"], "kinds": linked("TestKinds", model=["model", 0], name=f"{name}.json")}
    kinds["model"]["inputs"]["model_name"] = name
    done = host.run(kinds)
    assert done["status"]["status_str"] == "success", error_of(done)
    model, network, keys = json.loads((host.base / "output" / f"{name}.json").read_text())
    assert {"WAN21_CausalAR", "WAN21", "HostModel"} <= set(model)
    assert {"CausalWanModel", "WanModel"} <= set(network)
    assert set(keys) == set(tiny_causal(text_dim=TEXT_DIM).state_dict())


@pytest.mark.parametrize("family", [FRAMEWISE, CAUSVID], ids=lambda family: family.name)
def test_other_recipes_are_sampled_alike_by_both(host: Host, graph: Graph, family: Family) -> None:
    """Blocks of one latent frame; three noise levels, for which the network is given whole timesteps."""
    steps = len(family.noise.levels(family.usual.steps, family.noise.shift)) - 1
    graph = put(put(graph, "FlowCacheScheduler", steps=steps), "FlowCacheLatent", length=17)
    graph["model"]["inputs"] |= {"model_name": LONE, "family": family.name}
    ours = host.latents(graph)
    close(ours, host.latents(by_host(graph, family.layout.chunk_frames)))
    close(normalise(ours), alone(family, frames=17))


def test_the_hosts_scheduler_gives_the_trained_levels(host: Host, graph: Graph) -> None:
    ours = host.latents(graph)
    basic = {**graph, "sigmas": linked("BasicScheduler", model=["model", 0], scheduler="simple", steps=4, denoise=1.0)}
    close(host.latents(basic), ours)


def test_a_shift_that_another_node_has_set_counts(host: Host, graph: Graph) -> None:
    """As in the host's own scheduler; a shift of the node's own goes before it."""
    shifted = {**graph, "shifted": linked("ModelSamplingSD3", model=["model", 0], shift=3.0)}
    by_node = {**shifted, "sigmas": linked("FlowCacheScheduler", model=["shifted", 0], steps=4, shift=0.0, denoise=1.0)}
    by_hand = put(graph, "FlowCacheScheduler", shift=3.0)
    assert refusal(host, by_node) == refusal(host, by_hand) != ""
    ours = {**shifted, "sigmas": linked("FlowCacheScheduler", model=["shifted", 0], steps=4, shift=5.0, denoise=1.0)}
    close(host.latents(ours), host.latents(graph))


def test_guidance_which_the_hosts_sampler_cannot_do(host: Host, graph: Graph) -> None:
    guided = put(graph, "CFGGuider", cfg=3.0)
    close(normalise(host.latents(guided)), alone(cfg=3.0))
    assert refusal(host, by_host(guided))


def test_a_budget_makes_one_film_under_both_samplers(host: Host, graph: Graph) -> None:
    """With KV Compressor between, whose hooks on the host's sampler leave ours alone."""
    budget = {"budget": 2.0, "unit": "chunks", "policy": "even", "dtype": "as computed", "offload": False, "soft": 0.0, "granularity": "frame"}
    graph["kv"] = linked("FlowCacheKVCompressor", model=["model", 0], sink=1, recent=1, **budget)
    graph = put(put(graph, "CFGGuider", model=["kv", 0]), "FlowCacheLatent", length=57)
    ours = host.latents(graph)
    close(ours, host.latents(by_host(graph)))
    close(normalise(ours), alone(frames=57, compressor=Compressor(Even(), 2.0, sink=1, recent=1, granularity="frame")))
    assert not torch.allclose(normalise(ours), alone(frames=57), atol=2e-3)


def test_the_bundled_model_keeps_history_by_its_own_salience_head_under_both_samplers(host: Host, graph: Graph) -> None:
    """Beyond the 15 latent frames of its training, which are fewer than those of the released models."""
    graph["model"] = linked("FlowCacheLoadModel", model_name="tiny-causal (bundled)", family="auto")
    graph["text"] = linked("CLIPTextEncode", clip=["model", 1], text=TEXT)
    budget = {"budget": 2.0, "unit": "chunks", "policy": "salience", "dtype": "as computed", "offload": False, "soft": 0.0, "granularity": "frame"}
    graph["kv"] = linked("FlowCacheKVCompressor", model=["model", 0], sink=1, recent=1, **budget)
    graph = put(put(graph, "CFGGuider", model=["kv", 0]), "FlowCacheLatent", length=93)
    ours = host.latents(graph)
    close(ours, host.latents(by_host(graph)))
    job = Job.usual(SELF_FORCING, TEXT, frames=93, seed=7, size=64)
    compressor = Compressor(Salience(), 2.0, sink=1, recent=1, granularity="frame")
    close(normalise(ours), generate(load_bundle(family=SELF_FORCING), job, compressor=compressor)[0])


def test_films_without_clean_passes_are_those_that_are_measured(host: Host, graph: Graph) -> None:
    """`bench causal` leaves the passes out by the family, the host's sampler by KV Compressor."""
    made = host.latents(budgeted(by_host(graph), clean_pass="none"))
    close(normalise(made), alone(replace(SELF_FORCING, clean_pass=False)))


def test_a_start_image_makes_one_film_under_both_samplers(host: Host, graph: Graph) -> None:
    """A latent frame of the picture, then chunks of three."""
    graph = put({**graph, "image": linked("EmptyImage", width=64, height=64, batch_size=1, color=0x204080)}, "FlowCacheLatent", length=29)
    given = linked("FlowCacheConditionFrames", model=["model", 0], vae=["words", 2], latent=["latent", 0], start=["image", 0], history=0)
    ours = host.latents({**graph, "given": given, "film": {**graph["film"], "inputs": {**graph["film"]["inputs"], "latent_image": ["given", 0]}}})
    size = {"width": 64, "height": 64, "length": 29, "batch_size": 1}
    start = linked("ARVideoI2V", model=["model", 0], vae=["words", 2], start_image=["image", 0], **size)
    theirs = put({**graph, "start": start}, "CFGGuider", model=["start", 0])
    close(ours, host.latents(by_host(theirs)))
    assert not torch.allclose(ours, host.latents(graph), atol=2e-3)
    assert "ARVideoI2V gives its start image to Sampler AR Video alone: use AR Video Frames In" in refusal(host, theirs)


def budgeted(graph: Graph, **settings: Any) -> Graph:
    """With KV Compressor, which keeps all of history."""
    budget = {"budget": 100.0, "unit": "chunks", "policy": "sink-recent", "dtype": "as computed", "offload": False, "soft": 0.0}
    graph["kv"] = linked("FlowCacheKVCompressor", model=["model", 0], sink=1, recent=0, granularity="token", **budget, **settings)
    return put(graph, "CFGGuider", model=["kv", 0])


@pytest.mark.parametrize("recache", ["off", "at every change"])
def test_a_prompt_schedule_makes_one_film_under_both_samplers(host: Host, graph: Graph, recache: str) -> None:
    """Under the host's by KV Compressor. A saved run goes on in the same way."""
    plain = host.latents(graph)
    graph["text"] = linked("FlowCachePromptSchedule", clip=["words", 1], schedule=f"1: {TEXT}\n3: green square", recache=recache)
    ours = host.latents(graph)
    assert torch.equal(ours, host.latents(put(graph, "FlowCacheSampler", save_every=1)))
    close(ours, host.latents(budgeted(by_host(graph))))
    assert torch.equal(ours[:, :, :6], plain[:, :, :6])
    assert not torch.allclose(ours[:, :, 6:], plain[:, :, 6:], atol=2e-2)


def test_what_is_for_the_hosts_sampler_is_refused_under_ours(host: Host, graph: Graph) -> None:
    assert "clean_pass of KV Compressor is for Sampler AR Video" in refusal(host, budgeted(graph, clean_pass="none"))


def test_a_lora_of_a_training_state_changes_the_film_as_its_weights_would(host: Host, graph: Graph) -> None:
    graph["model"]["inputs"]["lora"] = LORA
    ours = host.latents(graph)
    close(ours, host.latents(by_host(graph)))
    close(normalise(ours), alone(network=with_longlive()))
    for name in (KOHYA, WAN_FUN, DIFFUSERS):
        graph["model"]["inputs"]["lora"] = name
        assert torch.equal(host.latents(graph), ours), f"the same LoRA under the names of {name}"
    graph["model"]["inputs"]["lora"] = "other.pt"
    assert "other.pt: 1 of 1 tensors are for no layer of this model, such as blocks.9.self_attn.q.lora_A.weight" in refusal(host, graph)


def test_a_lora_may_hold_whole_differences(host: Host, graph: Graph) -> None:
    graph["model"]["inputs"]["lora"] = CHANGES
    close(normalise(host.latents(graph)), alone(network=with_differences()))
    graph["model"]["inputs"]["lora"] = "modulated.safetensors"
    assert "modulated.safetensors: 1 of 4 tensors are changes of modulations (.diff_m), which ComfyUI puts on no model" in refusal(host, graph)
    graph["model"]["inputs"]["lora"] = "narrow.safetensors"
    assert "1 layers of the LoRA do not fit, such as blocks.0.norm3.weight: it is for (128,), this model has (256,)" in refusal(host, graph)


def test_another_model_in_between_and_a_second_run_change_nothing(host: Host, graph: Graph) -> None:
    first = host.latents(graph)
    other = host.latents(by_host(put(graph, "FlowCacheLatent", width=32)))
    host.ask("/free", {"unload_models": True, "free_memory": True})
    assert torch.equal(first, host.latents(put(graph, "RandomNoise", noise_seed=7)))
    assert other.shape != first.shape


def test_what_does_not_fit_is_refused_before_it_runs(host: Host, graph: Graph) -> None:
    loads = host.log.read_text().count("Requested to load NativeModel")
    sentences = {
        "3 latent frames per block, and num_frame_per_block is 1: set it to 3": by_host(graph, 1),
        "3 latent frames per chunk, and chunk_frames is 1: set it to 0 or 3": put(graph, "FlowCacheSampler", chunk_frames=1),
        "was distilled on 4 noise levels, 1, 0.9375, 0.8333, 0.625, and 0.9615 is none of them (6 steps were asked for)": put(
            graph, "FlowCacheScheduler", steps=6
        ),
        "finishes every chunk before the next begins, and with ar_step 1 and 4 steps": put(graph, "FlowCacheSampler", ar_step=1),
        "causal-wan looks back only, bidirectional attention is not for it": put(graph, "FlowCacheSampler", attention="bidirectional (as trained)"),
        "fps 24 would change nothing": put(graph, "FlowCacheSampler", fps="24"),
    }
    for sentence, one in sentences.items():
        assert sentence in refusal(host, one)
    assert host.log.read_text().count("Requested to load NativeModel") == loads, "no weights are loaded for a refusal"

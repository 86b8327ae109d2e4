"""Causal Wan models in a real ComfyUI: loaded as published, as the host's own model, and sampled by its sampler and by ours to the same film."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowcache_core.models.bundle import Bundle
from flowcache_core.models.causal_wan_family import SELF_FORCING
from flowcache_core.models.wan_vae import normalise
from flowcache_core.models.word_text import encode_prompt
from flowcache_core.run.generate import Job, generate
from tests.host import NEEDS_HOST, Graph, Host, error_of, put, with_nodes
from tests.tiny_causal import PUBLISHED, TO_HOST, tiny_causal

pytestmark = NEEDS_HOST
FILE, REPACK, LONE = "self_forcing.pt", "repack.safetensors", "lone.safetensors"
TEXT_DIM = 256
"""That of the CLIP that comes with the bundled model."""
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
    weights = tiny_causal(text_dim=TEXT_DIM).state_dict()
    torch.save(PUBLISHED["training state"](weights), folder / FILE)
    save_file(weights, folder / REPACK, TO_HOST)
    save_file(weights, folder / LONE)
    with with_nodes(base, KINDS, ("--fp32-unet",)) as running:
        yield running


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
        "sampler": linked("FlowCacheSampler", solver="auto", ar_step=-1, chunk_frames=0, window=0, fps="auto"),
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


def alone(**changes: Any) -> Tensor:
    """The film without a host."""
    bundle = Words(SELF_FORCING, tiny_causal(text_dim=TEXT_DIM), nn.Identity(), SELF_FORCING.layout)
    return generate(bundle, Job.usual(SELF_FORCING, TEXT, **{"frames": 33, "seed": 7, "size": 64, "negative": NEGATIVE, **changes}))[0]


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

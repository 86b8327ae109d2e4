"""Stock nodes that patch a MODEL, in a real ComfyUI: they have their effect on our network, or are refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.models.bundle import Bundle, load_bundle
from flowcache_core.models.wan_vae import normalise
from flowcache_core.ranks.world import Spread
from flowcache_core.run import generate as core
from flowcache_core.run.turn import Turn
from tests.host import BIDIRECTIONAL, NEEDS_HOST, Graph, Host, HostJob, after_loader, inside, node, put, refused, report_of, small, without_cache

pytestmark = NEEDS_HOST
OTHER_PACK = """
import torch

class Patch:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "patch", ("MODEL",)
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})

class CompiledBlock(Patch):
    def patch(self, model):
        model = model.clone()
        model.add_object_patch("diffusion_model.blocks.0", torch.compile(model.get_model_object("diffusion_model.blocks.0")))
        return (model,)

class CompiledNetwork(Patch):
    def patch(self, model):
        model = model.clone()
        model.add_object_patch("diffusion_model", torch.compile(model.get_model_object("diffusion_model")))
        return (model,)

class OtherBlock(Patch):
    def patch(self, model):
        model = model.clone()
        model.add_object_patch("diffusion_model.blocks.0", torch.nn.Identity())
        return (model,)

class WrappedNetwork(Patch):
    def patch(self, model):
        model = model.clone()
        model.add_wrapper_with_key("diffusion_model", "my_wrapper", lambda executor, *args, **kwargs: executor(*args, **kwargs))
        return (model,)

class OtherAttention(Patch):
    def patch(self, model):
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *args, **kwargs: func(*args, **kwargs)
        return (model,)

class TwoDevices(Patch):
    def patch(self, model):
        model = model.clone()
        model.set_additional_models("multigpu", [model.clone()])
        return (model,)

class OtherSampler(Patch):
    def patch(self, model):
        model = model.clone()
        model.add_wrapper_with_key("sampler_sample", "other", lambda executor, guider, sigmas, extra, callback, noise, *rest: noise)
        return (model,)

class SkippedForGood(Patch):
    def patch(self, model):
        model = model.clone()
        model.set_model_patch_replace(lambda args, more: args, "dit", "double_block", 1)
        return (model,)

class CompiledInPlace(Patch):
    def patch(self, model):
        model.model.diffusion_model.blocks[0].compile()
        return (model,)

class Faded(Patch):
    def patch(self, model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.9)
        return (model,)

class FrameMask:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "mask", ("MASK",)
    INPUT_TYPES = classmethod(lambda cls: {"required": {"frames": ("INT",), "first": ("INT",), "last": ("INT",)}})

    def mask(self, frames, first, last):
        mask = torch.zeros(frames, 8, 8)
        mask[first:last] = 1
        return (mask,)

NODE_CLASS_MAPPINGS = {one.__name__: one for one in (*Patch.__subclasses__(), FrameMask)}
"""
"""Nodes of another pack that patch models as packs do."""
FOREIGN = {
    "CompiledBlock": "torch.compile",
    "CompiledNetwork": "torch.compile",
    "OtherBlock": "diffusion_model.blocks.0 of the network was replaced by Identity",
    "WrappedNetwork": "my_wrapper wraps the network",
    "TwoDevices": "texts would be evaluated by copies of the model on other devices",
}
SKIP = {"double_layers": "1, 2", "start_percent": 0.0, "end_percent": 1.0}
UNSERVED: dict[str, tuple[dict[str, Any], str]] = {
    "PerturbedAttentionGuidance": ({"scale": 3.0}, "PerturbedAttentionGuidance would change nothing"),
    "SelfAttentionGuidance": ({"scale": 0.5, "blur_sigma": 2.0}, "SelfAttentionGuidance would change nothing"),
    "NAGuidance": ({"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5}, "NAGuidance would change nothing"),
    "HyperTile": ({"tile_size": 256, "swap_size": 2, "max_depth": 0, "scale_depth": False}, "HyperTile would change nothing"),
    "TomePatchModel": ({"ratio": 0.3}, "TomePatchModel would change nothing"),
    "PatchModelAddDownscale": (
        {"block_number": 3, "downscale_factor": 2.0, "start_percent": 0.0, "end_percent": 0.35, "downscale_after_skip": True,
         "downscale_method": "bicubic", "upscale_method": "bicubic"},
        "PatchModelAddDownscale would change nothing",
    ),
    "FreeU_V2": ({"b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}, "a node asks for model_channels, which a U-Net has, as FreeU does"),
    "ScaleROPE": ({"scale_x": 1.0, "shift_x": 0.0, "scale_y": 1.0, "shift_y": 0.0, "scale_t": 0.5, "shift_t": 0.0}, "ScaleROPE changes positions"),
    "DifferentialDiffusion": ({}, "Differential Diffusion changes masks from step to step"),
    "WanContextWindowsManual": (
        {"context_length": 81, "context_overlap": 30, "context_schedule": "standard_static", "context_stride": 1, "closed_loop": False,
         "fuse_method": "pyramid", "freenoise": False, "retain_first_frame": False, "split_conds_to_windows": False},
        "Context Windows cut a film that is already made chunk by chunk",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    base = tmp_path_factory.mktemp("comfy")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "other_pack.py").write_text(OTHER_PACK)
    with Host(base, options=("--fp32-unet",)) as running:
        yield running


@pytest.fixture
def plain(graph: Graph) -> Graph:
    """Two chunks, uncached, CFG 3."""
    return put(put(without_cache(small(graph, steps=5, length=21)), "FlowCacheLatent", width=64, height=64), "CFGGuider", cfg=3.0)


@pytest.mark.parametrize("kind", UNSERVED)
def test_what_would_change_nothing_is_refused_by_name(host: Host, plain: Graph, kind: str) -> None:
    inputs, sentence = UNSERVED[kind]
    refused(host, after_loader(plain, kind, **inputs), f"{sentence}.*bypass that node")


def test_what_is_put_behind_our_nodes_is_refused_before_weights_move(host: Host, graph: Graph) -> None:
    tiles = {"class_type": "HyperTile", "inputs": {**UNSERVED["HyperTile"][0], "model": [node(graph, "FlowCacheChunkwise"), 0]}}
    refused(host, {**put(graph, "CFGGuider", model=["tiles", 0]), "tiles": tiles}, "^AR Chunk Sampler: HyperTile would change nothing")


def test_a_compiled_model_is_refused_by_name(host: Host, plain: Graph) -> None:
    refused(host, after_loader(plain, "TorchCompileModel", backend="inductor"), "torch.compile .TorchCompileModel and its like.*bypass that node")


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_other_packs_put_around_the_network_is_refused_by_name(host: Host, plain: Graph, kind: str) -> None:
    refused(host, after_loader(plain, kind), f"{FOREIGN[kind]}.*bypass that node")


def test_attention_that_another_node_has_set_attends_and_is_named(host: Host, plain: Graph) -> None:
    other = after_loader(plain, "OtherAttention")
    assert report_of(host, plain)["kernels"]["attention"] == ["PyTorch"]
    assert report_of(host, other)["kernels"]["attention"] == ["OtherAttention in place of ComfyUI's attention_sub_quad"]
    torch.testing.assert_close(host.latents(other), host.latents(plain), rtol=1e-3, atol=1e-3)


def test_a_film_that_the_sampler_did_not_make_does_not_end_in_success(host: Host, plain: Graph) -> None:
    assert torch.isfinite(host.latents(plain)).all()
    refused(host, after_loader(plain, "OtherSampler"), "the sampler was not asked for this film.*bypass that node")


def test_a_block_that_is_replaced_for_good_is_replaced_in_commits_too(host: Host, plain: Graph) -> None:
    made = put(after_loader(plain, "SkippedForGood"), "RandomNoise", noise_seed=3)
    bundle = load_bundle(dtype=torch.float32)
    through: Callable[..., Tensor] = type(bundle.network).through
    bundle.network.through = lambda layer, block, tokens, *given: tokens if layer == 1 else through(bundle.network, layer, block, tokens, *given)
    film, _ = core.generate(bundle, job_of(made))
    torch.testing.assert_close(normalise(host.latents(made)), film, atol=5e-3, rtol=5e-3)


def job_of(graph: Graph) -> HostJob:
    prompt, negative = (graph[graph[node(graph, "CFGGuider")]["inputs"][end][0]]["inputs"]["text"] for end in ("positive", "negative"))
    return HostJob(prompt, frames=21, steps=5, seed=3, size=64, cfg=3.0, negative=negative)


@dataclass(frozen=True)
class OverGuided:
    """Another way to combine the branches of `guided`."""

    guided: core.Guided

    @property
    def branches(self) -> tuple[str, ...]:
        return self.guided.branches

    @property
    def context(self) -> Tensor:
        return self.guided.context

    @property
    def spread(self) -> Spread:
        return self.guided.spread

    @property
    def own(self) -> slice:
        return self.guided.own


@dataclass(frozen=True)
class SkipLayers(OverGuided):
    """Skip-layer guidance by hand: the conditional branch again, without some blocks, against its own history."""

    scale: float

    def __call__(self, turn: Turn, x: Tensor) -> Tensor:
        context, branches, network = self.context, self.branches, self.guided.bundle.network
        prompt, negative = turn.denoise(x.expand(2, -1, -1, -1, -1), context, branches).chunk(2)
        through: Callable[..., Tensor] = type(network).through
        network.through = lambda layer, block, tokens, *given: tokens if layer in (1, 2) else through(network, layer, block, tokens, *given)
        skipped = turn.denoise(x, context[:1], branches[:1], "without blocks 1 and 2")
        del network.through
        return negative + self.guided.job.cfg * (prompt - negative) + self.scale * (prompt - skipped)


@dataclass(frozen=True)
class EarlyGuidance(OverGuided):
    """CFG at the first steps, the prompt alone at the others; commits are for both texts."""

    last: float

    def __call__(self, turn: Turn, x: Tensor) -> Tensor:
        if turn.committing or self.guided.levels[turn.step] > self.last:
            return self.guided(turn, x)
        return turn.denoise(x, self.context[:1], self.branches[:1])


def test_guidance_that_ends_early_leaves_the_history_of_both_texts(host: Host, plain: Graph) -> None:
    made = put(after_loader(plain, "CFGOverride", cfg=1.0, start_percent=0.5, end_percent=1.0), "RandomNoise", noise_seed=3)
    bundle, job = load_bundle(dtype=torch.float32), job_of(made)
    guided = EarlyGuidance(core.Guided(bundle, job), last=8 * 0.5 / (1 + 7 * 0.5))
    torch.testing.assert_close(normalise(host.latents(made)), sampled(bundle, job, guided), atol=5e-3, rtol=5e-3)


def on_text(graph: Graph, kind: str, **inputs: Any) -> Graph:
    """The graph with one more node behind the prompt."""
    out = copy.deepcopy(graph)
    guider = out[node(out, "CFGGuider")]["inputs"]
    out["more"] = {"class_type": kind, "inputs": {"conditioning": guider["positive"], **inputs}}
    guider["positive"] = ["more", 0]
    return out


def test_a_text_for_the_first_steps_leaves_its_history(host: Host, plain: Graph) -> None:
    """The prompt twice, once for the first steps alone, is the prompt."""
    made = on_text(plain, "ConditioningSetTimestepRange", start=0.0, end=0.5)
    prompt, guider = plain[node(plain, "CFGGuider")]["inputs"]["positive"], made[node(made, "CFGGuider")]["inputs"]
    made["both"] = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": prompt, "conditioning_2": ["more", 0]}}
    guider["positive"] = ["both", 0]
    torch.testing.assert_close(host.latents(made), host.latents(plain), atol=5e-3, rtol=5e-3)


# several noise levels in one evaluation: bidirectional attention, chunks one behind the other


@pytest.fixture
def staggered(plain: Graph) -> Graph:
    """Three chunks, two steps apart."""
    graph = put(put(plain, "FlowCacheSampler", attention=BIDIRECTIONAL, ar_step=2, solver="euler"), "RandomNoise", noise_seed=3)
    return put(put(graph, "FlowCacheLatent", length=33), "BasicScheduler", steps=6)


def in_sections(graph: Graph, guided: Callable[[core.Guided], Any]) -> Tensor:
    bundle = load_bundle(dtype=torch.float32)
    job = replace(job_of(graph), frames=33, steps=6, ar_step=2, solver="euler")
    with torch.inference_mode():
        made = core._made(bundle, job, job.sections(bundle), guided(core.Guided(bundle, job)), lambda chunk: None, core.NOTHING,
                          lambda adapter, sigmas: adapter, None, None, None, None)  # fmt: skip
    return made[0]


@dataclass(frozen=True)
class EachAtItsLevel(OverGuided):
    """The prompt alone for the frames that are at `last` or below, CFG for the others; of clean latents, `kept` is kept."""

    last: float = -1.0
    kept: float = 1.0

    def __call__(self, turn: Turn, x: Tensor) -> Tensor:
        prompt, negative = turn.denoise(x.expand(2, -1, -1, -1, -1), self.context, self.branches).chunk(2)
        levels = torch.tensor(turn.levels or (self.guided.levels[turn.step],)).view(-1, 1, 1)
        out = torch.where(levels > self.last, negative + self.guided.job.cfg * (prompt - negative), prompt)
        return (x - self.kept * (x - levels * out)) / levels.clamp(min=1e-6)


@pytest.mark.parametrize(
    ("kind", "inputs", "guided"),
    [
        ("CFGOverride", {"cfg": 1.0, "start_percent": 0.4, "end_percent": 1.0}, {"last": 8 * 0.6 / (1 + 7 * 0.6)}),
        ("Faded", {}, {"kept": 0.9}),
    ],
)
def test_guidance_of_a_section_sees_every_chunk_at_its_own_level(
    host: Host, staggered: Graph, kind: str, inputs: dict[str, Any], guided: dict[str, Any]
) -> None:
    film = normalise(host.latents(after_loader(staggered, kind, **inputs)))
    torch.testing.assert_close(film, in_sections(staggered, lambda usual: EachAtItsLevel(usual, **guided)), atol=2e-2, rtol=2e-2)
    assert not torch.allclose(film[:, :, :3], normalise(host.latents(staggered))[:, :, :3], atol=0.1)


def test_a_text_for_the_last_steps_counts_in_every_chunk_of_a_section(host: Host, staggered: Graph) -> None:
    made = on_text(staggered, "ConditioningSetTimestepRange", start=0.0, end=0.5)
    guider = made[node(made, "CFGGuider")]["inputs"]
    made["late"] = {"class_type": "ConditioningSetTimestepRange", "inputs": {"conditioning": guider["negative"], "start": 0.5, "end": 1.0}}
    made["both"] = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["more", 0], "conditioning_2": ["late", 0]}}
    film, plain = host.latents(put(made, "CFGGuider", positive=["both", 0])), host.latents(staggered)
    for first in (0, 3, 6):
        assert not torch.allclose(film[:, :, first : first + 3], plain[:, :, first : first + 3], atol=0.1)


def test_the_same_text_at_all_steps_in_two_pieces_is_that_text_in_every_chunk(host: Host, staggered: Graph) -> None:
    made = on_text(staggered, "ConditioningSetTimestepRange", start=0.0, end=0.5)
    prompt = staggered[node(staggered, "CFGGuider")]["inputs"]["positive"]
    made["late"] = {"class_type": "ConditioningSetTimestepRange", "inputs": {"conditioning": prompt, "start": 0.5, "end": 1.0}}
    made["both"] = {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["more", 0], "conditioning_2": ["late", 0]}}
    torch.testing.assert_close(host.latents(put(made, "CFGGuider", positive=["both", 0])), host.latents(staggered), atol=5e-3, rtol=5e-3)


# what nodes keep from one step to the next


def momentum(graph: Graph, length: int = 21, **settings: Any) -> Graph:
    graph = put(put(graph, "FlowCacheLatent", length=length), "FlowCacheSampler", **settings)
    return after_loader(graph, "APG", eta=1.0, norm_threshold=5.0, momentum=-0.75)


def test_momentum_of_guidance_is_that_of_the_chunk(host: Host, plain: Graph) -> None:
    """The first chunk sees no other one, so it is the same however far ahead of them it is."""
    close, apart = (host.latents(momentum(plain, ar_step=ar_step))[:, :, :3] for ar_step in (2, 5))
    torch.testing.assert_close(close, apart, atol=5e-3, rtol=5e-3)
    assert not torch.allclose(close, host.latents(plain)[:, :, :3], atol=0.1)


def test_momentum_of_chunks_of_other_lengths(host: Host, plain: Graph) -> None:
    assert torch.isfinite(host.latents(momentum(put(plain, "FlowCacheLatent", snap="off"), 29, ar_step=2))).all()


# masks on texts


def masked(graph: Graph, frames: int, first: int, last: int) -> Graph:
    """The prompt within the mask, and the negative text everywhere."""
    made = on_text(graph, "ConditioningSetMask", mask=["frames", 0], strength=1.0, set_cond_area="default")
    made["frames"] = {"class_type": "FrameMask", "inputs": {"frames": frames, "first": first, "last": last}}
    return made


@pytest.mark.parametrize("settings", [{}, {"attention": BIDIRECTIONAL, "ar_step": 2}], ids=["block-causal", "bidirectional"])
def test_a_mask_has_frames_of_the_film(host: Host, plain: Graph, settings: dict[str, Any]) -> None:
    """Where the prompt counts in the first chunk alone, that chunk is as with the prompt, and the other is not."""
    plain = put(plain, "FlowCacheSampler", **settings)
    everywhere, first = host.latents(masked(plain, 6, 0, 6)), host.latents(masked(plain, 6, 0, 3))
    torch.testing.assert_close(everywhere, host.latents(plain), atol=5e-3, rtol=5e-3)
    if not settings:
        torch.testing.assert_close(first[:, :, :3], everywhere[:, :, :3], atol=5e-3, rtol=5e-3)
    assert not torch.allclose(first[:, :, 3:], everywhere[:, :, 3:], atol=0.1)


def test_a_mask_of_another_length_is_refused(host: Host, plain: Graph) -> None:
    refused(host, masked(plain, 3, 0, 3), "^AR Chunk Sampler: the mask on a text has 3 frames, and the film has 6 latent frames")


# what this network has no place for


def test_a_start_image_on_a_text_is_refused(host: Host, plain: Graph) -> None:
    made, guider = copy.deepcopy(plain), plain[node(plain, "CFGGuider")]["inputs"]
    texts = {name: guider[name] for name in ("positive", "negative")}
    vae = node(plain, "VAEDecode")
    made["picture"] = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}}
    size = {"width": 64, "height": 64, "length": 21, "batch_size": 1}
    made["wan"] = {"class_type": "WanImageToVideo", "inputs": {**texts, **size, "vae": plain[vae]["inputs"]["vae"], "start_image": ["picture", 0]}}
    refused(host, put(made, "CFGGuider", positive=["wan", 0], negative=["wan", 1]), "a start image was put on a text.*AR Video Frames In gives")


def test_a_reference_picture_on_a_text_is_refused(host: Host, plain: Graph) -> None:
    made = on_text(plain, "ReferenceLatent", latent=[node(plain, "FlowCacheLatent"), 0])
    refused(host, made, "a reference picture was put on a text.*AR Video Frames In gives")


def test_steps_at_which_no_text_counts_are_refused_before_the_run(host: Host, plain: Graph) -> None:
    made = on_text(plain, "ConditioningSetTimestepRange", start=0.0, end=0.5)
    made["one"] = {"class_type": "BasicGuider", "inputs": {"model": [node(plain, "FlowCacheLoadModel"), 0], "conditioning": ["more", 0]}}
    alone = put(made, "SamplerCustomAdvanced", guider=["one", 0])
    refused(host, alone, r"^AR Chunk Sampler: at 2 steps, noise levels 0\.842 to 0\.667, no text counts .Conditioning Set Timestep")
    assert torch.isfinite(host.latents(made)).all(), "the other text counts"


@pytest.mark.parametrize("sampling", ["lcm", "v_prediction", "x0"])
def test_another_kind_of_prediction_is_refused(host: Host, plain: Graph, sampling: str) -> None:
    refused(host, after_loader(plain, "ModelSamplingDiscrete", sampling=sampling, zsnr=False), "set to another kind of prediction.*bypass that node")
    assert torch.isfinite(host.latents(after_loader(plain, "ModelSamplingSD3", shift=5.0))).all()


def test_an_area_of_a_text_is_refused(host: Host, plain: Graph) -> None:
    made = on_text(plain, "ConditioningSetAreaPercentage", width=0.5, height=0.5, x=0, y=0, strength=1.0)
    refused(host, made, "a text was given an area of the picture.*bypass that node")


def test_a_second_model_is_refused(host: Host, plain: Graph) -> None:
    made, guider = copy.deepcopy(plain), plain[node(plain, "CFGGuider")]["inputs"]
    made["two"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": guider["model"], "shift": 5.0}}
    made["dual"] = {"class_type": "DualModelGuider", "inputs": {**guider, "model_negative": ["two", 0]}}
    refused(host, put(made, "SamplerCustomAdvanced", guider=["dual", 0]), "makes a film with one model, and .* evaluates a second one")


def by_hand(bundle: Bundle, job: HostJob, scale: float) -> Tensor:
    return sampled(bundle, job, SkipLayers(core.Guided(bundle, job), scale))


def sampled(bundle: Bundle, job: HostJob, evaluate: Any) -> Tensor:
    with torch.inference_mode():
        made = core._made(bundle, job, job.schedule(bundle, 0, 0), evaluate, lambda chunk: None, core.NOTHING, lambda adapter, sigmas: adapter,
                          None, None, None, None)  # fmt: skip
    return made[0]


def test_skip_layer_guidance_is_what_it_is_by_hand(host: Host, plain: Graph) -> None:
    guided = put(after_loader(plain, "SkipLayerGuidanceDiT", **SKIP, single_layers="", scale=2.0, rescaling_scale=0.0), "RandomNoise", noise_seed=3)
    film = normalise(host.latents(guided))
    torch.testing.assert_close(film, by_hand(load_bundle(dtype=torch.float32), job_of(guided), 2.0), atol=5e-3, rtol=5e-3)
    assert not torch.allclose(film, normalise(host.latents(put(plain, "RandomNoise", noise_seed=3))), atol=0.1)


@pytest.mark.parametrize("attention", ["auto", BIDIRECTIONAL])
@pytest.mark.parametrize(("kind", "inputs"), [("SkipLayerGuidanceDiT", {"scale": 2.0, "rescaling_scale": 0.0}), ("SkipLayerGuidanceDiTSimple", {})])
def test_guidance_by_skipped_blocks_changes_the_film(host: Host, plain: Graph, kind: str, inputs: dict[str, Any], attention: str) -> None:
    plain = put(plain, "FlowCacheSampler", attention=attention)
    film = host.latents(after_loader(plain, kind, **SKIP, single_layers="7", **inputs))
    assert torch.isfinite(film).all()
    assert not torch.allclose(film, host.latents(plain), atol=0.1)


def test_guidance_by_skipped_blocks_is_cached_too(host: Host, graph: Graph) -> None:
    cached = put(small(graph, 8, 21), "FlowCacheChunkwise", threshold=0.3, warmup_steps=2)
    film = host.latents(after_loader(cached, "SkipLayerGuidanceDiT", **SKIP, single_layers="", scale=2.0, rescaling_scale=0.0))
    assert torch.isfinite(film).all()
    assert not torch.allclose(film, host.latents(cached), atol=0.1)


def test_a_network_that_was_compiled_in_place_is_refused(host: Host, plain: Graph) -> None:
    """The last one here: the host keeps the model that the node has changed."""
    refused(host, after_loader(plain, "CompiledInPlace"), "torch.compile .*bypass that node")


FILMS = """
import comfy.hooks, comfy.samplers

loader, sampler, states = node("load_model").LoadARVideoModel, node("chunk_sampler"), node("states")
model, clip, _ = loader.execute(model_name="tiny-skyreels (bundled)").result
model = node("settings_on_model").with_devices(model, ())  # a clone, as any node makes one
text = clip.encode_from_tokens_scheduled(clip.tokenize("red circle moves right"))
saved = []
sampler.states_of = lambda every, guider, host: saved.append(states.film_of(guider, host))

def film(model, text):
    guider, noise = comfy.samplers.CFGGuider(model), torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    guider.set_conds(text, text)
    settings = node("sampler").ChunkSampler("auto", -1, 0, 0, 0, node("mailbox").Mailbox(), addnoise_condition=-1)
    return guider.sample(noise, torch.zeros_like(noise), settings, torch.tensor([1.0, 0.8, 0.0]), disable_pbar=True, seed=5)

def hooked(*keyframes):
    ones, place = torch.ones(2, model.model.diffusion_model.config.dim), "diffusion_model.blocks.0.cross_attn.k.lora_"
    hooks, group = comfy.hooks.create_hook_lora({place + "up.weight": ones.T, place + "down.weight": ones}, 1.0, 0.0), comfy.hooks.HookKeyframeGroup()
    for strength, begins in keyframes:
        group.add(comfy.hooks.HookKeyframe(strength, begins))
    hooks.set_keyframes_on_hooks(group)
    return comfy.hooks.set_hooks_for_conditioning(text, hooks)

def refusal(call, *args):
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    return ""

"""


def test_a_text_with_hooks_leaves_nothing_on_the_model_for_which_it_is_refused(tmp_path: Path) -> None:
    code = """
bare, other, hooks = film(model, text), model.clone(), hooked()
changed = film(model, hooks), film(other, hooks)
print(json.dumps([torch.equal(changed[0], bare), torch.equal(film(other, text), bare), refusal(node("fit").require_ours, model, "a node")]))
"""
    assert inside(tmp_path, FILMS + code) == [False, True, ""]


def test_a_film_is_the_same_to_its_saved_state_whatever_ran_before(tmp_path: Path) -> None:
    """The host's network computes in another dtype until the weights of the next run are moved, and the host notes in hooks how far a run is."""
    code = """
half, hooks, differ = model.clone(), hooked((0.5, 0.0)), []
half.set_model_compute_dtype(torch.bfloat16)
for one, words in ((model, text), (half, text), (model, hooks)):
    film(one, words)
for one, words, first in ((half, text, saved[1]), (model, text, saved[0]), (model, hooks, saved[2])):
    film(one, words)
    differ.append([name for name in first if saved[-1][name] != first[name]])
film(model, hooked((0.6, 0.0)))
print(json.dumps([*differ, [name for name in first if saved[-1][name] != first[name]]]))
"""
    assert inside(tmp_path, FILMS + code) == [[], [], [], ["conditioning positive", "conditioning negative", "other settings on the model"]]


def test_hooks_that_change_over_the_steps_are_refused_and_steady_ones_are_not(tmp_path: Path) -> None:
    code = """
steady = film(model, hooked((1.0, 0.0), (1.0, 0.3)))
print(json.dumps([torch.equal(steady, film(model, hooked())), refusal(film, model, hooked((1.0, 0.0), (0.0, 0.3)))]))
"""
    same, said = inside(tmp_path, FILMS + code)
    assert same
    assert said.startswith("AR Chunk Sampler: a text has hooks whose strength changes from step to step")

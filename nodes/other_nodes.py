"""What other nodes have put on a MODEL: the blocks they replace, which our network serves, and all that would do nothing, refused by name."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import torch

from ..flowcache_core.models.family import OpenBlocks

Replace = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
"""As Wan models of the host have it: (what the block is given, {"original_block": ...}) -> {"img": tokens}."""
BASE = "flowcache_blocks"
"""Key in transformer_options: the blocks that are replaced in every evaluation of a run."""
CACHES = ("easycache", "lazycache")
COMPILE = "torch.compile"
SAMPLING, FLOW = "model_sampling", comfy.model_sampling.CONST()
"""Name of the object on a MODEL that says what its network predicts, and what says that of a flow."""
EXACT = 1e-6
"""Noise levels nearer to each other than this are the same to the host, which compares them in float32."""
SKIPPED = "SkipLayerGuidance"
"""How nodes are called whose guidance skips blocks."""
NO_EFFECT = {"PerturbedAttentionGuidance": "it replaces the attention of a U-Net's middle block"}
"""Node classes whose functions call the network again in a way that changes nothing here -> why."""
TRANSFORMER = {"rope_options": "ScaleROPE changes positions, which are those of the KV cache here"}
MODEL = {
    "context_handler": "Context Windows cut a film that is already made chunk by chunk: set window or attention of AR Chunk Sampler",
    "denoise_mask_function": "Differential Diffusion changes masks from step to step, and given frames are kept whole here",
}


PICTURES = "this network takes none: AR Video Frames In gives first or last frames to the latent"
ON_TEXTS = {
    "control": "a ControlNet was applied to a text, and this network takes none",
    "gligen": "GLIGEN boxes were put on a text, and this network takes none",
    "area": "a text was given an area of the picture, and a chunk is always evaluated whole (Conditioning Set Mask has an effect)",
    **dict.fromkeys(("concat_latent_image", "time_dim_concat"), f"a start image was put on a text, and {PICTURES}"),
    **dict.fromkeys(("reference_latents", "clip_vision_output"), f"a reference picture was put on a text, and {PICTURES}"),
    **dict.fromkeys(
        ("vace_frames", "control_video", "pose_video_latent", "face_video_pixels", "reference_motion"), f"a film was put on a text, and {PICTURES}"
    ),
    "camera_conditions": "the way of a camera was put on a text, and this network takes none",
    "audio_embed": "sound was put on a text, and this network takes none",
}
"""Key of a conditioning -> why it cannot be served."""


def require_served(model: Any, node: str) -> None:
    """Raises ValueError for the first thing on a MODEL that would do nothing, or that cannot work with chunks, and says from where it comes."""
    if why := next(_unserved(model), None):
        raise ValueError(f"{node}: {why}; bypass that node")


def _unserved(model: Any) -> Iterator[str]:
    wrappers, patches = getattr(model, "wrappers", {}), getattr(model, "object_patches", {})
    options = getattr(model, "model_options", {})
    keys = [key for kind in wrappers.values() for key, some in kind.items() if some]
    yield from (f"{key} skips steps without knowing of chunks, so they cannot work together" for key in CACHES if key in keys)
    network = getattr(getattr(model, "model", model), "diffusion_model", None)
    if COMPILE in keys or any(map(is_compiled, (network, *patches.values()))):
        yield "the model goes through torch.compile (TorchCompileModel and its like), which would not see the chunks and the KV cache of a run"
    yield from (
        f"{name} of the network was replaced by {made_by(patch)}"
        for name, patch in patches.items()
        if name.startswith("diffusion_model") and not of_this_pack(patch)
    )
    inside = wrappers.get(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, {})
    yield from (f"{key or made_by(one)} wraps the network as it is in another model" for key, some in inside.items() for one in some)
    yield from (why for key, why in MODEL.items() if options.get(key) is not None)
    if not isinstance(patches.get(SAMPLING, FLOW), comfy.model_sampling.CONST):
        yield "the MODEL was set to another kind of prediction (ModelSamplingDiscrete and its like), and this network predicts the velocity of a flow"
    if getattr(model, "additional_models", {}).get("multigpu"):
        yield "texts would be evaluated by copies of the model on other devices, and the KV cache of a run is on one"
    yield from _without_effect(options)
    if (family := getattr(getattr(model, "model", model), "family", None)) is not None and family.guidance.inside:
        yield from (f"{made_by(one)} changes how texts are combined, and {family.title} does that inside the run" for one in on_guidance(options))
    yield from _unserved_patches(options.get("transformer_options", {}), type(network))


def of_this_pack(patch: Any) -> bool:
    """Whether KV Compressor put it there, for the host's sampler of causal models: other samplers do not come across it."""
    module: str = getattr(getattr(patch, "func", None), "__module__", "")
    return module.rpartition(".")[0] == __package__


def is_compiled(thing: Any) -> bool:
    """Whether torch.compile made it, or has compiled it or a part of it in place."""
    if hasattr(thing, "_orig_mod") or hasattr(thing, "_torchdynamo_orig_callable"):
        return True
    return isinstance(thing, torch.nn.Module) and any(getattr(part, "_compiled_call_impl", None) for part in thing.modules())


def _without_effect(options: dict[str, Any]) -> Iterator[str]:
    yield from (f"{name} would change nothing: {NO_EFFECT[name]}" for name in map(made_by, on_guidance(options)) if name in NO_EFFECT)


def changes_guidance(patcher: Any, model_options: dict[str, Any]) -> bool:
    """Whether another node has put something around the evaluations of a guider."""
    return bool(around_guidance(patcher, model_options))


def around_guidance(patcher: Any, model_options: dict[str, Any]) -> list[Any]:
    """The functions that other nodes have put around the evaluations of a guider."""
    out = list(on_guidance(model_options))
    for kind in (comfy.patcher_extension.WrappersMP.PREDICT_NOISE, comfy.patcher_extension.WrappersMP.CALC_COND_BATCH):
        out += comfy.patcher_extension.get_all_wrappers(kind, model_options, is_model_options=True)
        out += patcher.get_all_wrappers(kind)
    return out + [model_options[name] for name in ("model_function_wrapper",) if name in model_options]


def on_guidance(options: dict[str, Any]) -> Iterator[Any]:
    """The functions that other nodes have put around guidance."""
    kinds = ("sampler_post_cfg_function", "sampler_pre_cfg_function", "sampler_cfg_function", "sampler_calc_cond_batch_function")
    some = (options.get(kind) or () for kind in kinds)
    yield from (one for each in some for one in (each if isinstance(each, list | tuple) else [each]))


def _unserved_patches(options: dict[str, Any], network: type) -> Iterator[str]:
    yield from (why for key, why in TRANSFORMER.items() if options.get(key))
    for kind, some in options.get("patches", {}).items():
        yield from (f"{made_by(one)} would change nothing: it works on {kind}, which this network does not have" for one in some)
    for kind, table in options.get("patches_replace", {}).items():
        for place, one in table.items():
            if kind != "dit":
                yield f"{made_by(one)} would change nothing: it replaces {kind}, which this network does not offer"
            elif place[0] == "double_block" and not issubclass(network, OpenBlocks):
                yield f"{made_by(one)} replaces blocks, which this kind of model does not offer"


def require_served_now(options: dict[str, Any], network: type) -> None:
    """The same for the transformer_options of one evaluation: guidance may have put something there since."""
    if why := next(_unserved_patches(options, network), None):
        raise ValueError(f"{why}; bypass that node")


def blocks_of(options: dict[str, Any]) -> dict[int, Replace]:
    """By number, the blocks that an evaluation replaces. Places that only other networks have are left out, as the host's networks do."""
    table: dict[Any, Replace] = options.get("patches_replace", {}).get("dit", {})
    return {place[1]: replace for place, replace in table.items() if place[0] == "double_block"}


def name_of(blocks: dict[int, Replace]) -> Hashable:
    """The same for every evaluation with these blocks replaced by functions of the same origin."""
    return frozenset((layer, made_by(replace, whole=True)) for layer, replace in blocks.items())


def require_one_model(guider: Any, node: str) -> None:
    """Raises ValueError for a guider that evaluates a second model beside the one that the sampler knows."""
    patcher = comfy.model_patcher.ModelPatcher
    if any(isinstance(one, patcher) and one is not guider.model_patcher for one in vars(guider).values()):
        raise ValueError(f"{node} makes a film with one model, and {type(guider).__name__} evaluates a second one: use CFGGuider or BasicGuider")


def require_plain_texts(guider: Any, node: str, frames: int) -> None:
    """Raises ValueError for what hangs on a text and has no place in the chunks of a film of `frames` latent frames."""
    some = (one for many in guider.conds.values() for one in many)
    if found := next((key for one in some for key in ON_TEXTS if one.get(key) is not None), None):
        raise ValueError(f"{node}: {ON_TEXTS[found]}; bypass that node")
    for text in (one["cross_attn"] for many in guider.conds.values() for one in many if one.get("cross_attn") is not None):
        if text.ndim != 3 or not text.numel():
            raise ValueError(f"{node} was given a text of shape {tuple(text.shape)}, and needs films x words x channels: use a CLIP Text Encode node")
    for mask in (one["mask"] for many in guider.conds.values() for one in many if one.get("mask") is not None):
        if mask.shape[-3] not in (1, frames):
            raise ValueError(
                f"{node}: the mask on a text has {mask.shape[-3]} frames, and the film has {frames} latent frames: use a mask of one frame, which "
                f"counts for all, or of {frames}"
            )


def require_counting_texts(guider: Any, some: Iterable[dict[str, Any]], levels: Iterable[float], node: str) -> None:
    """Raises ValueError for a step at which none of the texts that are evaluated counts: there would be nothing to evaluate."""
    level_at = guider.model_patcher.get_model_object(SAMPLING).percent_to_sigma
    spans = [(_level(one, "start_percent", level_at, float("inf")), _level(one, "end_percent", level_at, 0.0)) for one in some]
    if spans and (without := [level for level in levels if not any(end - EXACT <= level <= start + EXACT for start, end in spans)]):
        raise ValueError(
            f"{node}: at {len(without)} steps, noise levels {max(without):.3f} to {min(without):.3f}, no text counts (Conditioning Set Timestep "
            "Range): combine it with one that counts there"
        )


def _level(text: dict[str, Any], name: str, level_at: Callable[[float], float], unset: float) -> float:
    percent = text.get(name)
    return unset if percent is None else float(level_at(percent))


def require_steady_hooks(guider: Any, node: str) -> None:
    """Raises ValueError for hooks whose strength follows a schedule of steps: the host goes through it once a run, and every chunk begins anew."""
    groups = (one.get("hooks") for many in guider.conds.values() for one in many)
    if any(len({key.strength for key in hook.hook_keyframe.keyframes}) > 1 for group in groups if group is not None for hook in group.hooks):
        raise ValueError(
            f"{node}: a text has hooks whose strength changes from step to step, and every chunk comes to its steps at another time: set keyframes "
            "of one strength, or bypass Set Hook Keyframes"
        )


def made_by(thing: Any, whole: bool = False) -> str:
    """The class of the node that made a function, or of the object; `whole`: with module and function."""
    name: str = getattr(thing, "__qualname__", type(thing).__qualname__)
    return f"{getattr(thing, '__module__', '')}.{name}" if whole else name.split(".")[0]

"""Whether a MODEL fits our nodes: looked at when a node gets it, before anything runs."""

from __future__ import annotations

import math
from typing import Any

import comfy.utils
import torch

from ..flowcache_core.models.adapter import require_tokens
from ..flowcache_core.models.checkpoint import titles
from ..flowcache_core.models.family import any_schedule
from ..flowcache_core.policies.protocol import CachePolicy, PartPolicy, TokenPolicy
from ..flowcache_core.sampling.schedule import ChunkSchedule
from .host_model import HostModel
from .other_nodes import require_served

STEPS = 4
"""As many as every family can go through."""
HOOKED = "flowcache_hooked"
"""Attachment of a MODEL: the mark that hooks on weights have left on it."""
CAST = "manual_cast_dtype"
"""Patch of an object by which ModelComputeDtype sets the dtype of computation."""


def require_ours(model: Any, node: str, others: str = "") -> HostModel:
    """The HostModel in a MODEL. Raises ValueError that names what was connected instead; `others`: what else the node serves."""
    inner = getattr(model, "model", model)
    if not isinstance(inner, HostModel):
        raise ValueError(f"{node} cannot serve a {type(inner).__name__} model: load it with the Load AR Video Model node ({titles()}){others}")
    _require_fitting_lora(model, inner, node)
    require_served(model, node)
    return inner


def require_film(host: HostModel, frames: int, prefix: int = 0, suffix: int = 0) -> None:
    """Raises ValueError for a film of so many latent frames, some of them given, that the model does not make, in whatever steps."""
    layout, family = host.layout, host.family
    family.require_frames(family.frames.pixel(frames), layout.chunk_frames)
    if family.check is not any_schedule:
        apart = family.published.stagger(STEPS)
        family.check(ChunkSchedule(frames, layout.chunk_frames, STEPS, apart, layout.window, prefix, suffix, family.frames, layout.aligned))


def require_network(policy: CachePolicy, host: HostModel) -> None:
    """Raises ValueError for a policy that runs single tokens where the network cannot."""
    if isinstance(policy, TokenPolicy | PartPolicy):
        require_tokens(host.adapter(), policy.title, host.layout.chunk_frames if isinstance(policy, TokenPolicy) else None)


def _require_fitting_lora(model: Any, inner: HostModel, node: str) -> None:
    """A LoRA changes a weight by the product of two matrices, or by a change that it holds whole: these have to fit."""
    wrong = []
    for key, patches in getattr(model, "patches", {}).items():
        shape = tuple(comfy.utils.get_attr(inner, key).shape)
        for lora in (patch[1] for patch in patches if getattr(patch[1], "name", "") == "lora" and patch[3] is None):
            made_for = (lora.weights[0].shape[0], math.prod(lora.weights[1].shape[1:]))
            if lora.weights[3] is None and lora.weights[5] is None and made_for != (shape[0], math.prod(shape[1:])):
                wrong.append((key.removeprefix("diffusion_model."), made_for, shape))
        for made_for in map(_shape_of_change, patches):
            if made_for not in (None, shape):
                wrong.append((key.removeprefix("diffusion_model."), made_for, shape))
    if wrong:
        key, made_for, shape = wrong[0]
        raise ValueError(
            f"{node}: {len(wrong)} layers of the LoRA do not fit, such as {key}: it is for {made_for}, this model has {shape}. "
            f"It was made for another size: use one for {inner.family.release(inner.diffusion_model.config)}, or bypass it"
        )
    if (useless := _added_nothing(model)) is None:
        return
    if CAST in useless.object_patches:  # the host keeps the same of both
        raise ValueError(
            f"{node}: a node before it changed nothing: it is a ModelComputeDtype with the dtype that the MODEL has already, or a LoRA of which the "
            "log lists all layers as not loaded. Bypass that node"
        )
    raise ValueError(
        f"{node}: none of the LoRA's layers is in this model, so it would change nothing (the log lists them as not loaded): it was made for "
        f"another kind of model, or names its layers in the Diffusers way, which this ComfyUI does not read for {inner.family.title}. Bypass it, "
        "or use one with original or kohya names"
    )


def _shape_of_change(patch: Any) -> tuple[int, ...] | None:
    """Of a change that a LoRA holds whole, such as of norms and biases; None for other patches."""
    match patch[1]:
        case ("diff", (torch.Tensor() as change,)) if patch[3] is None:
            return tuple(change.shape)
    return None


def _added_nothing(model: Any) -> Any:
    """The MODEL behind a node that marked it as patched and left its patches the same: of the weights that they are for none is there, or they set
    the dtype that was set. None where there is no such node."""
    before = getattr(model, "parent", None)
    if before is None:
        return None
    marked = model.patches_uuid != before.patches_uuid and _others(model) == _others(before)
    return model if marked and _count(model) == _count(before) else _added_nothing(before)


def remember_hooks(model: Any) -> None:
    """During a run: texts with hooks on weights mark a MODEL as patched, and the host leaves the mark on it when it takes their patches away."""
    if model.hook_patches:
        model.set_attachments(HOOKED, model.patches_uuid)


def _count(model: Any) -> int:
    return sum(map(len, model.patches.values()))


def _others(model: Any) -> tuple[Any, ...]:
    """What else marks a MODEL as patched: another dtype of computation, wrapped weights, hooks."""
    wrapped = {name: len(some) for name, some in model.weight_wrapper_patches.items()}
    hooks = set(model.hook_patches), model.get_attachment(HOOKED)
    return CAST in model.object_patches, model.object_patches.get(CAST), wrapped, *hooks

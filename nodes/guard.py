"""Puts a cache policy on a MODEL, with a check that runs when sampling is asked for and before any weights are loaded."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
import comfy.samplers

from ..flowcache_core.decision import CachePolicy, Foresees
from .host_model import NOT_CHUNKWISE, OPTIONS, policy_of

KEY = "flowcache"


def with_policy(model: Any, policy: CachePolicy) -> Any:
    """A clone of a ModelPatcher that carries the policy; what an earlier cache node had put there is replaced."""
    patched = model.clone()
    options = patched.model_options.setdefault("transformer_options", {})
    patched.model_options["transformer_options"] = {**options, OPTIONS: {"policy": policy}}
    outer = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    patched.remove_wrappers_with_key(outer, KEY)
    patched.add_wrapper_with_key(outer, KEY, guard)
    return patched


def guard(executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *rest: Any, **more: Any) -> Any:
    """Refuses a stock sampler, and settings that the run's steps cannot serve; otherwise it is not there."""
    if isinstance(sampler, comfy.samplers.KSAMPLER):
        raise ValueError(NOT_CHUNKWISE)
    policy = policy_of(executor.class_obj.model_options)
    if isinstance(policy, Foresees):
        policy.check_run(len(sigmas) - 1)
    return executor(noise, latent_image, sampler, sigmas, *rest, **more)

"""Around every run of our MODEL: the wrapper that patcher.py puts on it. What is checked there, the sampler knows."""

from __future__ import annotations

from .fit import remember_hooks
from .native_model import frames_per_block, host_has, require_block
from .settings_on_model import DEVICES_NODE, devices_of, nodes_of, policy_node, wrong_sampler


def outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):  # type: ignore[no-untyped-def]
    """Around every run of our MODEL, before weights are moved: our sampler checks its plan here, a stock one is refused our settings."""
    remember_hooks(executor.class_obj.model_patcher)
    around = getattr(sampler, "around", None)
    if around is not None:
        return around(executor, noise, latent_image, sampler, sigmas, *args, **kwargs)
    model, options = executor.class_obj.model_patcher.model, executor.class_obj.model_options
    frames = frames_per_block(sampler) if host_has(model.family) else None
    if frames is not None:
        require_block(model, frames)
    if nodes := nodes_of(options) if frames is None else policy_node(options) or DEVICES_NODE * bool(devices_of(options)):
        raise ValueError(wrong_sampler(nodes))
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

"""Around every run of our MODEL: the wrapper that patcher.py puts on it. What is checked there, the sampler knows."""

from __future__ import annotations

from .settings_on_model import nodes_of, wrong_sampler


def outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):  # type: ignore[no-untyped-def]
    """Around every run of our MODEL, before weights are moved: our sampler checks its plan here, a stock one is refused our settings."""
    around = getattr(sampler, "around", None)
    if around is not None:
        return around(executor, noise, latent_image, sampler, sigmas, *args, **kwargs)
    if nodes := nodes_of(executor.class_obj.model_options):
        raise ValueError(wrong_sampler(nodes))
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

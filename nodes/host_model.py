"""A model of ours as ComfyUI has it: patched, offloaded and guided like any other. How it is loaded, patcher.py knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_sampling
import comfy.supported_models_base
import torch

from ..flowcache_core.models.adapter import ModelAdapter
from ..flowcache_core.models.checkpoint import Found
from ..flowcache_core.models.family import ChunkLayout, Family, Latents, Preview
from ..flowcache_core.run.run import Run
from ..flowcache_core.sampling.noise import Curved
from .host_network import LEVELS, host_network
from .texts import MASK, read_rows

TIMES = 4
"""Frames of a latent frame, as the host has it for the VAEs of films."""
TABLE = 960


class HostModel(comfy.model_base.BaseModel):
    """A flow model of per-chunk noise levels. What a run of AR Chunk Sampler will hold is part of its memory estimate."""

    def __init__(self, model_config: HostConfig, layout: ChunkLayout, device: Any = None) -> None:
        family = model_config.found.family
        comfy.model_base.BaseModel.__init__(
            self, model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=self.network_of(family)
        )  # by name: the models of the host that may stand between take no network
        self.device = None  # the patcher decides where it is
        if isinstance(family.noise, Curved):
            self.model_sampling = curved_sampling(family.noise)(model_config)
        self.family: Family = family
        self.layout = layout
        self.files: tuple[Path, ...] = ()
        """From which the weights were read."""
        self._expected: Run | None = None

    @staticmethod
    def network_of(family: Family) -> type[Any]:
        """The class of the network."""
        return host_network(family)

    @property
    def network(self) -> Any:
        """What an adapter runs."""
        return self.diffusion_model

    def adapter(self, dtype: torch.dtype | None = None) -> ModelAdapter:
        return self.family.adapter(self.network, dtype or self.get_dtype_inference())

    def dtype_of(self, patcher: Any) -> torch.dtype:
        """In what a MODEL will be computed: this one may still be as another clone of it wanted."""
        dtype: torch.dtype = patcher.get_model_object("manual_cast_dtype") or self.get_dtype()
        return dtype

    def size_of(self, shape: Sequence[int]) -> str:
        """What a film of latents [films, C, F, h, w] measures, in words: stock nodes count frames and pixels in other ways."""
        frames, side = self.family.frames.pixel(shape[2]), self.family.latents.spatial
        return f"a film of {frames} frames, {shape[4] * side} x {shape[3] * side} pixels"

    @contextmanager
    def expecting(self, run: Run) -> Iterator[None]:
        """Until the block ends, or the run begins (`begun`), estimates of memory are of this run."""
        self._expected = run
        try:
            yield
        finally:
            self._expected = None

    def begun(self) -> None:
        """What was expected is held from now on, and no longer to be asked for."""
        self._expected = None

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        if kwargs.get("cross_attn") is not None:
            out["c_crossattn"] = comfy.conds.CONDRegular(read_rows(kwargs["cross_attn"], kwargs.get(MASK), self.family))
        return out

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # type: ignore[no-untyped-def]  # noqa: B006
        """The host's: x [n, C, F, h, w], noise levels t [n] -> clean latents. Those of each frame by its own level, where they have several."""
        clean = super()._apply_model(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        levels = transformer_options.get(LEVELS)
        return clean if levels is None else x + (clean - x) * (levels / t.view(-1, 1, 1, 1, 1))

    def memory_required(self, input_shape: Any, cond_shapes: Any = {}) -> Any:  # noqa: B006 (the host's signature)
        """Bytes for an evaluation of `input_shape`; before a run of chunks, of one chunk and all that the run will hold."""
        run = self._expected
        if run is None:
            return super().memory_required(input_shape, cond_shapes)
        batch = input_shape[0] * run.branches // run.place.branches
        return super().memory_required([batch, input_shape[1], run.longest, *input_shape[3:]], cond_shapes) + run.held.held


class Exactly(int):
    """Channels that latents have to come with. The host repeats empty latents to the number that it finds different, which would make a film of
    any kind of latent, of another length and size than was asked for."""

    def __ne__(self, other: object) -> bool:
        return False


@lru_cache
def film_format(latents: Latents, preview: Preview | None = None) -> Any:
    """The host's latent format, or one of our own, but pictures and other kinds of latents stay what they are, so that the sampler can refuse them.

    `preview`: other colours of previews than the host's.
    """
    name = latents.host_format or "LatentFormat"
    base = getattr(comfy.latent_formats, name)
    fields: dict[str, Any] = {"latent_channels": Exactly(latents.channels), "latent_dimensions": 0}
    if latents.host_format is None:
        fields |= {"scale_factor": latents.scale, "spacial_downscale_ratio": latents.spatial, "temporal_downscale_ratio": TIMES}
    if preview is not None:
        fields |= {"latent_rgb_factors": [list(colour) for colour in preview.factors], "latent_rgb_factors_bias": list(preview.bias)}
    return type(name, (base,), fields)


@lru_cache
def curved_sampling(noise: Curved) -> Any:
    """The host's flow sampling with the levels of `noise`: its scheduler "simple" then gives those of the family.

    It takes levels from a table, of so many that every published number of steps divides it.
    """

    class CurvedSampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        def set_parameters(self, shift: float = 1.0, timesteps: int = TABLE, multiplier: float = 1000) -> None:
            super().set_parameters(shift, timesteps, multiplier)

        def sigma(self, timestep: Any) -> Any:
            return noise.level(1 - timestep / self.multiplier, self.shift)

        def percent_to_sigma(self, percent: float) -> float:
            return noise.level(min(max(percent, 0.0), 1.0), self.shift)

    return CurvedSampling


class Sizes(dict[str, Any]):
    """Sizes of the network, as the host keeps them. Nodes that ask for one of a U-Net are told that this is none."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"a node asks for {key}, which a U-Net has, as FreeU does: this model is a transformer, so bypass that node")


class HostConfig(comfy.supported_models_base.BASE):
    unet_config: dict[str, Any] = {}
    unet_extra_config: dict[str, Any] = {}
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]

    def __init__(self, found: Found, quantised: bool, operations: Any = None, preview: Preview | None = None) -> None:
        self.found = found
        self.latent_format = film_format(found.family.latents, preview or found.family.latents.preview)
        self.sampling_settings = {"shift": found.family.noise.shift}
        super().__init__(self.sizes())
        self.unet_config = Sizes(self.unet_config)
        self.memory_usage_factor = found.config.dim / 2222
        self.quant_config = {"mixed_ops": True} if quantised else None
        self.custom_operations = operations

    def sizes(self) -> dict[str, Any]:
        """What the network is made with."""
        return {"config": self.found.config}

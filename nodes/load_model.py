"""Load AR Video Model."""

from __future__ import annotations

from typing import Any, Literal

import comfy.model_management
import comfy.sd
import comfy.utils
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..flowcache_core import models
from ..flowcache_core.device import fast_dtype
from ..flowcache_core.models.bundle import files_of
from ..flowcache_core.models.checkpoint import titles
from ..flowcache_core.models.family import AUTO, Family
from .bundled_clip import bundled_clip
from .lora import NONE, lora_files, with_lora
from .magi_vae import MagiHostVAE
from .model_files import choices, path_of
from .patcher import load
from .within import within_schema


def bundled() -> dict[str, Family]:
    """The tiny models that come with the pack, by what the node calls them."""
    return {f"{family.bundled.name} (bundled)": family for family in models.FAMILIES if family.bundled}


def loaders(what: Literal["clip", "vae"]) -> str:
    """The host's nodes that load it, of all families."""
    return " or ".join(dict.fromkeys(getattr(family.loaders, what) for family in models.FAMILIES))


class LoadARVideoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheLoadModel",
            display_name="Load AR Video Model",
            category="FlowCache",
            description=f"Loads {titles()}, or a bundled tiny model, which brings its CLIP and VAE along.",
            search_aliases=["skyreels", "diffusion forcing", "autoregressive video", "self-forcing", "causal-forcing", "causvid", "longlive", "krea"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[*bundled(), *choices()],
                    default=next(iter(bundled())),
                    tooltip=f"The bundled tiny model, or a file of {titles()}, or a folder with its shards, in models/diffusion_models.",
                ),
                io.Combo.Input(
                    "family",
                    options=[AUTO, *(family.name for family in models.FAMILIES)],
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="What kind of model the file is. Auto: as its metadata say, or its shapes; some kinds have the same shapes.",
                ),
                io.Combo.Input(
                    "lora",
                    options=lora_files(),
                    default=NONE,
                    optional=True,
                    advanced=True,
                    tooltip="A LoRA that belongs to the model as published, such as lora.pt of LongLive, in models/loras, at full strength. "
                    "For others use Load LoRA behind this node.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="For Empty AR Video Latent, the cache nodes, the guider and the scheduler."),
                io.Clip.Output(tooltip=f"Only for the bundled model; for a real checkpoint use {loaders('clip')}."),
                io.Vae.Output(tooltip=f"Only for the bundled model; for a real checkpoint use {loaders('vae')}."),
            ],
        )

    @classmethod
    @within_schema
    def execute(cls, model_name: str, family: str = AUTO, lora: str = NONE) -> io.NodeOutput:
        if model_name not in bundled():
            model = load(path_of(model_name), model_name, family)
            if lora != NONE:
                model = with_lora(model, lora)
            beside = model.model.family.loaders
            return io.NodeOutput(model, _absent("CLIP", beside.clip), _absent("VAE", beside.vae))
        if lora != NONE:
            raise ValueError(f"{model_name} comes whole, and {lora} is for another model: set lora to {NONE}")
        mine = bundled()[model_name]
        assert mine.bundled is not None
        network, vae_file = files_of(mine)
        model = load(network, model_name, mine.name)
        on_cpu = comfy.model_management.is_device_cpu(comfy.model_management.vae_device())
        kind = comfy.sd.VAE if mine.latents.host_format else MagiHostVAE
        vae = kind(comfy.utils.load_torch_file(str(vae_file)), dtype=fast_dtype() if on_cpu else None)
        return io.NodeOutput(model, bundled_clip(mine.bundled, model.model.diffusion_model.config.text_dim), vae)


def _absent(what: str, instead: str) -> Any:
    return ExecutionBlocker(f"{what} comes with the bundled model only: for this checkpoint use {instead}")

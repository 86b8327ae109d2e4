"""Load AR Video Model."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..flowcache_core.device import fast_dtype
from ..flowcache_core.models import bundle
from ..flowcache_core.models.shards import open_checkpoint
from .host_model import ChunkLayout, load
from .model_files import choices, path_of
from .word_clip import word_clip

BUNDLED = f"{bundle.NAME} (bundled)"
SKYREELS = ChunkLayout(chunk_frames=5, window=5)


class LoadARVideoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheLoadModel",
            display_name="Load AR Video Model",
            category="FlowCache",
            description="Loads a SkyReels-V2 diffusion-forcing model, or the bundled tiny one, which brings its CLIP and VAE along.",
            search_aliases=["skyreels", "diffusion forcing", "autoregressive video"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=[BUNDLED, *choices()],
                    default=BUNDLED,
                    tooltip="The bundled tiny model, or a SkyReels-V2 DF file, or a folder with its shards, in models/diffusion_models.",
                )
            ],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(tooltip="Only for the bundled model; for a real checkpoint use Load CLIP (umt5-xxl, type wan)."),
                io.Vae.Output(tooltip="Only for the bundled model; for a real checkpoint use Load VAE (Wan 2.1)."),
            ],
        )

    @classmethod
    def execute(cls, model_name: str) -> io.NodeOutput:
        if model_name == BUNDLED:
            metadata = open_checkpoint(bundle.NETWORK).metadata
            model = load(bundle.NETWORK, model_name, ChunkLayout(int(metadata["chunk_frames"]), int(metadata["window_chunks"]), causal=True))
            on_cpu = comfy.model_management.is_device_cpu(comfy.model_management.vae_device())
            vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(bundle.VAE)), dtype=fast_dtype() if on_cpu else None)
            return io.NodeOutput(model, word_clip(model.model.diffusion_model.config.text_dim), vae)
        model = load(path_of(model_name), model_name, SKYREELS)
        return io.NodeOutput(model, _absent("CLIP", "Load CLIP (umt5-xxl, type wan)"), _absent("VAE", "Load VAE (Wan 2.1 VAE)"))


def _absent(what: str, instead: str) -> Any:
    return ExecutionBlocker(f"{what} comes with the bundled model only: for this checkpoint use {instead}")

"""Load MAGI-1 VAE."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..flowcache_core.models.shards import read
from .magi_vae import MagiHostVAE
from .within import within_schema

FOLDER = "vae"


class LoadMagiVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheLoadMagiVAE",
            display_name="Load MAGI-1 VAE",
            category="FlowCache",
            description="Loads the VAE of MAGI-1, which Load VAE does not know. It goes wherever a VAE goes.",
            search_aliases=["magi", "vae", "load vae"],
            inputs=[
                io.Combo.Input("vae_name", options=folder_paths.get_filename_list(FOLDER),
                               tooltip="ckpt/vae/diffusion_pytorch_model.safetensors of MAGI-1, in models/vae."),
            ],
            outputs=[io.Vae.Output(tooltip="For VAE Decode, Save AR Video and AR Video Frames In.")],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, vae_name: str) -> io.NodeOutput:
        weights, _ = read(Path(folder_paths.get_full_path_or_raise(FOLDER, vae_name)))
        try:
            return io.NodeOutput(MagiHostVAE(weights))
        except ValueError as error:
            raise ValueError(f"{vae_name}: {error}") from error

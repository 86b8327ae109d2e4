"""SkyReels-V2 diffusion forcing as a family."""

from __future__ import annotations

from ..sampling.frames import FOUR_N_PLUS_1
from ..sampling.guidance import ClassifierFree
from ..sampling.noise import FlowNoise
from .family import Bundled, ChunkLayout, Family, Latents, Loaders
from .key_names import original_names
from .skyreels import FPS, PATCH, SkyReelsV2
from .skyreels_adapter import SkyReelsAdapter
from .skyreels_checkpoint import claims, release_of, skyreels_config
from .wan_vae import LATENT_CHANNELS, SPATIAL, WanVAE
from .word_text import encode_prompt

SKYREELS = Family(
    name="skyreels-v2-df",
    title="SkyReels-V2 diffusion forcing",
    network=SkyReelsV2,
    adapter=SkyReelsAdapter,
    original_names=original_names,
    claims=claims,
    config_of=skyreels_config,
    release=release_of,
    layout=ChunkLayout(chunk_frames=5, window=5),
    frames=FOUR_N_PLUS_1,
    latents=Latents(LATENT_CHANNELS, SPATIAL, PATCH, "Wan21"),
    noise=FlowNoise(),
    guidance=ClassifierFree(),
    rates=FPS,
    takes_rate=lambda config: config.fps,
    loaders=Loaders("Load CLIP (umt5-xxl, type wan)", "Load VAE (Wan 2.1)"),
    bundled=Bundled("tiny-skyreels", "tiny-wan-vae", WanVAE.from_state_dict, encode_prompt),
)

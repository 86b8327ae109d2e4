"""SkyReels-V2 diffusion forcing as a family."""

from __future__ import annotations

from ..sampling.frames import FOUR_N_PLUS_1
from ..sampling.guidance import ClassifierFree
from ..sampling.noise import FlowNoise
from .family import Bundled, ChunkLayout, Family, Latents, Loaders, Preview
from .key_names import original_names
from .skyreels import FPS, PATCH, SkyReelsV2
from .skyreels_adapter import SkyReelsAdapter
from .skyreels_checkpoint import claims, release_of, shared, skyreels_config
from .wan_vae import LATENT_CHANNELS, SPATIAL, WanVAE
from .word_text import encode_prompt

TINY_PREVIEW = Preview(
    (
        (0.0426, 0.0478, -0.0055),
        (-0.005, 0.0547, 0.0349),
        (0.062, 0.0011, 0.021),
        (0.0173, 0.005, 0.0655),
        (0.0433, 0.0498, -0.0081),
        (-0.0045, 0.0538, 0.0366),
        (0.062, 0.0001, 0.0209),
        (0.0157, 0.0054, 0.0632),
        (0.043, 0.0504, -0.0073),
        (-0.0028, 0.0551, 0.0371),
        (0.0633, 0.0003, 0.0208),
        (0.0141, 0.0064, 0.063),
        (0.043, 0.0488, -0.0037),
        (-0.0057, 0.0533, 0.0362),
        (0.0636, 0.0027, 0.0194),
        (0.0154, 0.0055, 0.064),
    ),
    (-0.0072, -0.0127, -0.0226),
)
"""As `python -m flowcache_core.training preview` finds it."""

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
    file_names=("skyreels",),
    other_names=("wan2", "wan-2", "skyreels-v2-t2v"),
    shared=shared,
    loaders=Loaders("Load CLIP (umt5-xxl, type wan)", "Load VAE (Wan 2.1)"),
    bundled=Bundled("tiny-skyreels", "tiny-wan-vae", WanVAE.from_state_dict, encode_prompt, TINY_PREVIEW),
)

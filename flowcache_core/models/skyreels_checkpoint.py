"""What a SkyReels-V2 diffusion-forcing checkpoint looks like: its sizes by its shapes, and which files are nearly one but are not."""

from __future__ import annotations

from .family import Shapes
from .skyreels import PATCH, SkyReelsConfig
from .wan_vae import LATENT_CHANNELS

ANCHOR = "patch_embedding.weight"
"""A key that every file of a Wan network has."""
RELEASES = {
    (1536, 8960, 30, True): "SkyReels-V2-DF 1.3B",
    (5120, 13824, 40, False): "SkyReels-V2-DF 14B (540P and 720P have the same shapes)",
}
"""(width, width of the feed-forward layer, layers, frame-rate tensors) -> what was released with these sizes."""

IMAGE_KEYS = ("img_emb.", ".k_img.", ".add_k_proj.", "image_embedder.")


def claims(shapes: Shapes) -> bool:
    return ANCHOR in shapes


def skyreels_config(shapes: Shapes, name: str) -> SkyReelsConfig:
    """Sizes of the network. Raises ValueError for a file that is nearly one: image-to-video, or Wan 2.1 itself."""
    refuse_other_inputs(shapes, name, "SkyReels-V2 diffusion forcing")
    config = SkyReelsConfig.from_shapes(shapes)
    if (config.dim, config.ffn_dim, config.layers, not config.fps) in RELEASES and not config.fps:
        raise ValueError(
            f"{name} has the sizes of SkyReels-V2-DF 1.3B but not its frame-rate tensors (fps_embedding, fps_projection): "
            "it is Wan 2.1 or a model made from it, which has not learnt a noise level per chunk, or a repack that lost them; a causal model "
            "(Self-Forcing, Causal-Forcing, CausVid, LongLive) has these shapes too: then choose it in the input family"
        )
    return config


def release_of(config: SkyReelsConfig) -> str:
    """What was published with these sizes, or the sizes."""
    sizes = f"{config.layers} layers of width {config.dim}, {'with' if config.fps else 'without'} frame rate"
    return RELEASES.get((config.dim, config.ffn_dim, config.layers, config.fps), sizes)


def shared(config: SkyReelsConfig) -> bool:
    """Whether Wan 2.1 has these shapes, and all that is made from it: nothing else takes the frame rate."""
    return not config.fps


def refuse_other_inputs(shapes: Shapes, name: str, title: str) -> None:
    """Raises ValueError. `title`: what the file was taken to be."""
    takes, gives = (*shapes.get(ANCHOR, ()), 0, 0)[1], (*shapes.get("head.head.weight", ()), 0)[0] // PATCH**2
    image = next((key for key in shapes if any(part in key for part in IMAGE_KEYS)), None)
    if image or (takes and gives and takes != gives):
        why = f"it has {image}" if image else f"it takes {takes} channels and gives {gives}"
        raise ValueError(
            f"{name} is an image-to-video or control checkpoint ({why}): {title} needs no such weights, "
            "it takes the first frames as finished latents; load a text-to-video checkpoint of it"
        )
    if takes and takes != LATENT_CHANNELS:
        raise ValueError(
            f"{name} takes latents of {takes} channels, and {title} those of the Wan 2.1 VAE, which have {LATENT_CHANNELS}: 48 have Wan 2.2 5B and "
            "what is made from it, such as LongLive 2.0, which is not supported; load another checkpoint"
        )

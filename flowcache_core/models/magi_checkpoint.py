"""What a MAGI-1 checkpoint looks like: its sizes by its shapes. Base and distilled releases have the same shapes."""

from __future__ import annotations

from collections.abc import Iterable

from .family import Shapes
from .key_names import unwrapped
from .magi import GROUPS, LATENT_CHANNELS, MagiConfig
from .skyreels import DEEPEST, WIDEST

PART = "videodit_blocks."
LAYERS = PART + "layers."
FIRST = LAYERS + "0."
ANCHOR = FIRST + "self_attention.linear_qkv.qx.weight"
"""A key that no other network has."""
STACKED = LAYERS + "self_attention.linear_qkv.weight"
"""One of MAGI-1.1, of all layers."""
RELEASES = {
    (3072, 12288, 34, False): "MAGI-1 4.5B",
    (6144, 16384, 48, True): "MAGI-1 24B",
}
"""(width, width of the feed-forward layer, layers, whether that multiplies two halves) -> what was released with these sizes."""
AXES = {
    "x_embedder.weight": 5,
    "y_embedder.null_caption_embedding": 2,
    FIRST + "self_attention.linear_qkv.k.weight": 2,
    FIRST + "self_attention.q_layernorm.weight": 1,
    FIRST + "mlp.linear_fc1.weight": 2,
    FIRST + "mlp.linear_fc2.weight": 2,
}
"""The keys that tell the sizes, and how many axes they have."""


def claims(shapes: Shapes) -> bool:
    return any(key.startswith(PART) for key in shapes)


def original_names(keys: Iterable[str], keep: Iterable[str] = ()) -> dict[str, str]:
    return unwrapped(keys, keep, ANCHOR)


def magi_config(shapes: Shapes, name: str) -> MagiConfig:
    """Sizes of the network. Raises ValueError, with the reason, for a file that has none, or none that go together."""
    if STACKED in shapes:
        raise ValueError(
            "this is MAGI-1.1, which keeps all layers in one tensor, and whose network is not published: use the files of MAGI-1 (ckpt/magi)"
        )
    if missing := [key for key in (ANCHOR, *AXES) if key not in shapes]:
        raise ValueError(f"this is not a whole MAGI-1 checkpoint: it has no {missing[0]}; choose the folder with all of its shards")
    for key, axes in AXES.items():
        if len(shapes[key]) != axes or not all(1 <= size <= WIDEST for size in shapes[key]):
            raise ValueError(f"this is not a whole MAGI-1 checkpoint: {key} has shape {shapes[key]}; download it again")
    patches, caption, keys, head, fc1, fc2 = (shapes[key] for key in AXES)
    config = MagiConfig(patches[0], fc2[1], _layers(shapes), keys[0] // head[0], head[0], patches[1], caption[1], caption[0], fc1[0] == 2 * fc2[1])
    _require_whole_heads(config)
    return config


def release_of(config: MagiConfig) -> str:
    """What was published with these sizes, or the sizes."""
    sizes = f"{config.layers} layers of width {config.dim}, {config.kv_heads} key heads for {config.heads} query heads"
    return RELEASES.get((config.dim, config.ffn_dim, config.layers, config.gated), sizes)


def _layers(shapes: Shapes) -> int:
    numbers = (key.removeprefix(LAYERS).split(".")[0] for key in shapes if key.startswith(LAYERS))
    layers = 1 + max(int(number) for number in numbers if number.isdecimal())
    if layers > DEEPEST:
        raise ValueError(f"this is not a MAGI-1 checkpoint: a key names layer {layers - 1}, and at most {DEEPEST} are known; choose another file")
    return layers


def _require_whole_heads(config: MagiConfig) -> None:
    d, head, kv = config.dim, config.head_dim, config.kv_heads
    if d % head or d % GROUPS or head % 8 or not kv or config.heads % kv:
        raise ValueError(
            f"a width of {d} with heads of {head} and {kv} key heads do not divide: heads have to fill the width, in {GROUPS} equal parts, and share "
            "key heads evenly; download the file again"
        )
    if config.channels not in (LATENT_CHANNELS, 2 * LATENT_CHANNELS):
        raise ValueError(f"it takes {config.channels} channels, and MAGI-1 takes {LATENT_CHANNELS}, or each of them twice; choose another file")

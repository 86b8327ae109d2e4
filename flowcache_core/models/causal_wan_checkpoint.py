"""What a causal Wan checkpoint looks like: its sizes by its shapes, which are those of Wan 2.1. What a file is it says itself, or the user does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..untrusted import parsed
from . import key_names
from .family import Shapes
from .key_names import ANCHOR
from .skyreels import SkyReelsConfig
from .skyreels_checkpoint import refuse_other_inputs

SMALL, KREA = (1536, 8960, 30), (5120, 13824, 40)
"""Width, width of the feed-forward layer, layers: of Wan 2.1 T2V 1.3B and 14B."""
AVERAGED, LATEST = "generator_ema.", "generator."
"""Parts of a training state that hold the network: averaged over the training, and as the last step left it. The others are critics and the like."""
GENERATORS = (AVERAGED, LATEST)
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""Of modules that training wraps around others, at any depth."""
MODEL = "model."
"""How training names the network inside a generator, and LongLive's loader a file of a generator alone."""
HOST_CONFIG, HOST_KEY = "config", "causal_ar"
"""Where the metadata say to ComfyUI that a model is causal."""


def declares_causal(keys: Iterable[str], metadata: Mapping[str, str]) -> bool:
    """Whether a file is the state of a generator in training, is named as inside one, or says to ComfyUI that it is causal."""
    of_training = any(key.startswith(GENERATORS) or WRAPPERS.sub("", key) in (MODEL + ANCHOR, 2 * MODEL + ANCHOR) for key in keys)
    return of_training or _declared_to_host(metadata.get(HOST_CONFIG, ""))


def _declared_to_host(text: str) -> bool:
    try:
        config = parsed(text) if text else {}
    except ValueError:
        return False
    transformer = config.get("transformer") if isinstance(config, dict) else None
    return isinstance(transformer, dict) and transformer.get(HOST_KEY) is True


def original_names(keys: Iterable[str], keep: Iterable[str] = (), first: str = AVERAGED) -> dict[str, str]:
    """Key in the file -> name in the released checkpoint of Wan 2.1; of a training state, those of one generator: `first`, where the file has it."""
    names = {key: key for key in keys}
    for part in (first, *GENERATORS):
        if any(key.startswith(part) for key in names):
            names = {key: key.removeprefix(part) for key in names if key.startswith(part)}
            break
    plain = {key: WRAPPERS.sub("", name) for key, name in names.items()}
    while {MODEL + ANCHOR, 2 * MODEL + ANCHOR} & set(plain.values()):
        plain = {key: name.removeprefix(MODEL) for key, name in plain.items() if name.startswith(MODEL) or name in keep}
    released = key_names.original_names(plain.values(), keep)
    return {key: released[name] for key, name in plain.items() if name in released}


def claims(shapes: Shapes, sizes: tuple[int, int, int]) -> bool:
    """Whether a causal file can be of the model that was released with these `sizes`; one of no released size can be any."""
    d, ffn = (tuple(shapes.get(key, ()))[:1] for key in (ANCHOR, "blocks.0.ffn.0.weight"))
    other = [one for one in (SMALL, KREA) if one != sizes]
    return ANCHOR in shapes and (*d, *ffn) not in [one[:2] for one in other]


def config_of(shapes: Shapes, name: str, title: str) -> SkyReelsConfig:
    """Sizes of the network. Raises ValueError for image-to-video files, and for one that takes a frame rate, as SkyReels-V2 does."""
    refuse_other_inputs(shapes, name, title)
    config = SkyReelsConfig.from_shapes(shapes)
    if config.fps:
        raise ValueError(f"{name} has frame-rate tensors (fps_embedding, fps_projection), as SkyReels-V2 has, and {title} takes no frame rate")
    return config


def release_of(config: SkyReelsConfig, title: str, sizes: tuple[int, int, int]) -> str:
    """What was published with these sizes, or the sizes."""
    if (config.dim, config.ffn_dim, config.layers) != sizes:
        return f"{title}, {config.layers} layers of width {config.dim}"
    return f"{title} {'14B' if sizes == KREA else '1.3B'}"

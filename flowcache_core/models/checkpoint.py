"""Recognises the network in a checkpoint by its shapes, loads it strictly, and refuses everything else with a sentence."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..untrusted import short
from .family import AUTO, Family, Shapes
from .quantised import MARKER, Shaped, column_factors, is_companion, plain_shapes, restored, scale_key
from .shards import open_checkpoint
from .shards import read as read

OTHER_MODELS = {
    "lora_": "a LoRA: put it into models/loras and connect Load LoRA behind Load AR Video Model",
    "videodit_blocks.": "a MAGI-1 checkpoint",
    "vace_": "a VACE checkpoint",
    "control_adapter.": "a camera-control checkpoint",
    "face_adapter.": "a Wan Animate checkpoint",
    "double_blocks.": "a Flux or Hunyuan checkpoint",
    "encoder.block.": "a T5 text encoder: put it into models/text_encoders and use Load CLIP (type wan, or pixart for MAGI-1)",
    "token_embedding.": "a text encoder under names that Load CLIP does not read: use umt5_xxl_fp16 or umt5_xxl_fp8_e4m3fn_scaled",
    "encoder.downsamples.": "a VAE: put it into models/vae and use Load VAE",
    "encoder.patch_embed.": "the VAE of MAGI-1: put it into models/vae and use Load MAGI-1 VAE",
}
"""Part of a key -> what a file with such a key is."""
LABEL = re.compile(r"(?:^|\.)model_type\.(.+)$")
"""A tensor without meaning in whose name repacks for other nodes say which model they are."""
ARCHITECTURE = "architecture"
"""Where metadata name the family."""
NO_METADATA: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Found:
    """What a file holds. `names`: key in the file -> name in the released checkpoint; keys of other parts are left out."""

    family: Family
    config: Any
    names: dict[str, str]

    @property
    def release(self) -> str:
        return self.family.release(self.config)

    @property
    def matrices(self) -> frozenset[str]:
        """Names of the weights of linear layers; embeddings and convolutions are not among them."""
        with torch.device("meta"):
            layers = self.family.network(self.config).named_modules()
        return frozenset(f"{name}.weight" for name, layer in layers if isinstance(layer, nn.Linear))


def recognise(weights: Mapping[str, Shaped], name: str, metadata: Mapping[str, str] = NO_METADATA, family: str = AUTO,
              families: Sequence[Family] = ()) -> Found:  # fmt: skip
    """`weights`: key -> tensor, or what a header says of it; `family`: a name that the user chose, before what metadata and shapes say, of
    `families` (none: those that the nodes offer).

    Metadata that name no family of ours are another tool's, and say nothing. Raises ValueError unless it is a whole network of one
    family, with nothing left over.
    """
    families = families or models.FAMILIES
    names = [one.name for one in families]
    if family not in (AUTO, *names):
        raise ValueError(f"{name} is said to be of the family {short(family)!r}: there are {', '.join(names)}")
    chosen = family if family != AUTO else metadata.get(ARCHITECTURE, AUTO)
    labels = {key: label[1] for key in weights if (label := LABEL.search(key))}
    weights = {key: stored for key, stored in weights.items() if key not in labels}
    known = [one for one in families if one.name == chosen] or _candidates(families, weights, metadata)
    found, reasons, looked = list[Found](), list[ValueError](), list[Shapes]()
    for one in known:
        original = one.original_names(weights, (MARKER,))
        shapes = plain_shapes({new: weights[key] for key, new in original.items()})
        looked.append(shapes)
        if one.name != chosen and not one.claims(shapes):
            continue
        try:
            found.append(Found(one, _whole_config(one, shapes, name), original))
        except ValueError as error:
            reasons.append(error)
    if len(found) > 1:
        fitting = titles([one.family for one in found])
        raise ValueError(f"{name} could be {fitting}, which have the same shapes: choose one in the input family")
    if found:
        if found[0].family.name != chosen:
            _require_own_name(found[0], families, name, next(iter(labels.values()), ""))
        return found[0]
    for other in looked:
        _refuse_other_models(other, name, families)
    raise reasons[0] if reasons else ValueError(f"{name}: this is not a checkpoint of {titles(families)}: it has {_first(sorted(weights))}")


def _require_own_name(found: Found, families: Sequence[Family], name: str, label: str) -> None:
    """Raises ValueError for a file with the shapes of several models that is named as another one, or as none. `label`: what it calls itself."""
    family = found.family
    if not family.known_by_shapes:
        return
    plain = (label or name).lower().replace("_", "-")
    own = [word for word in family.file_names if word in plain]
    others = [word for one in families if not one.known_by_shapes for word in one.file_names] + [*family.other_names]
    if other := next((word for word in others if word in plain and (not own or any(mine in word for mine in own))), None):
        says = f"it calls itself {short(label)}" if label else f"its name speaks of {other!r}"
        raise ValueError(f"{name} has the shapes of {family.title}, and of other models; {says}: choose what it is in the input family")
    if not own and family.shared(found.config):
        raise ValueError(
            f"{name} has the shapes of {family.title}, and of other models, such as Wan 2.1 of the same size and what is made from it; neither the "
            f"file nor its name says which it is: choose what it is in the input family, or give it a name with {family.file_names[0]!r} in it"
        )


def _candidates(families: Sequence[Family], weights: Mapping[str, Shaped], metadata: Mapping[str, str]) -> list[Family]:
    """Those of which the file says that it is; where it says nothing, those that shapes can tell."""
    return [one for one in families if one.declares(weights, metadata)] or [one for one in families if one.known_by_shapes]


def titles(families: Sequence[Family] = ()) -> str:
    """The families that are known, in words; none: those that the nodes offer."""
    *others, last = [family.title for family in families or models.FAMILIES]
    return f"{', '.join(others)} or {last}" if others else last


def load_network(weights: Mapping[str, Tensor], name: str, dtype: torch.dtype, device: torch.device | str = "cpu",
                 metadata: Mapping[str, str] = NO_METADATA, family: str = AUTO, families: Sequence[Family] = ()) -> nn.Module:  # fmt: skip
    """Strictly loaded, in evaluation mode, with plain torch layers. Scaled fp8 weights are written out in `dtype`."""
    found = recognise(weights, name, metadata, family, families)
    mine = {new: weights[key] for key, new in found.names.items()}
    scales = {k: mine[k] for k in mine if is_companion(k, mine.keys())}
    return _filled(found, ((k, v) for k, v in mine.items() if k not in scales), scales, dtype, torch.device(device))


def load_network_file(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", family: str = AUTO,
                      families: Sequence[Family] = ()) -> nn.Module:  # fmt: skip
    """A file, any file of a set, or a folder -> the network; `dtype` None keeps that of the file. `families`: as in `recognise`.

    Refusals come before a tensor is read. Then file after file is read: what keeps its dtype and place stays mapped, and
    the peak of memory is that of the network and one file.
    """
    checkpoint = open_checkpoint(path)
    found = recognise(checkpoint.stored, checkpoint.name, checkpoint.metadata, family, families)
    names = found.names
    mine = {names[key] for key in names}
    aside = [key for key, name in names.items() if is_companion(name, mine)]
    scales = {names[key]: tensor for key, tensor in checkpoint.tensors(aside)}
    values = ((names[key], tensor) for key, tensor in checkpoint.tensors(names.keys() - set(aside)))
    return _filled(found, values, scales, dtype, torch.device(device))


def _filled(found: Found, weights: Iterator[tuple[str, Tensor]], scales: Mapping[str, Tensor], dtype: torch.dtype | None,
            device: torch.device) -> nn.Module:  # fmt: skip
    with torch.device("meta"):
        meant = {} if dtype is None else {key: slot.dtype for key, slot in found.family.network(found.config, dtype=dtype).named_parameters()}
    state: dict[str, Tensor] = {}
    for key, weight in weights:
        scale = scale_key(key, scales.keys())
        state[key] = restored(key, weight, scales[scale] if scale else None, meant.get(key, dtype), column_factors(key, scales)).to(device)
    sizes: Counter[torch.dtype] = Counter()
    for weight in state.values():
        sizes[weight.dtype] += weight.numel()
    with torch.device("meta"):
        network = found.family.network(found.config, dtype=dtype or sizes.most_common(1)[0][0])
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _whole_config(family: Family, shapes: Shapes, name: str) -> Any:
    """The sizes. Raises ValueError unless every key and shape of a network of these sizes is there, and no other."""
    try:
        config = family.config_of(shapes, name)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in family.network(config).state_dict().items()}
    missing, extra = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    if missing or extra:
        parts = [f"{len(keys)} {what} ({_first(keys)})" for keys, what in ((missing, "missing"), (extra, "unknown")) if keys]
        raise ValueError(f"{name} is not a complete {family.title} checkpoint: {' and '.join(parts)} of {len(wanted)} keys")
    wrong = [k for k in wanted if wanted[k] != shapes[k]]
    if wrong:
        key = wrong[0]
        more = f"; so have {len(wrong) - 1} more keys another shape: are the files of one model?" if len(wrong) > 1 else ""
        raise ValueError(f"{name}: {key} has shape {shapes[key]}, but a network of width {config.dim} needs {wanted[key]}{more}")
    return config


def _refuse_other_models(shapes: Shapes, name: str, families: Sequence[Family]) -> None:
    """What a family of ours claims is no other model's."""
    for part, what in OTHER_MODELS.items():
        if any(part in key for key in shapes) and not any(family.claims({part: ()}) for family in families):
            raise ValueError(f"{name} is {what}" if ":" in what else f"{name} is {what}: this loader knows {titles(families)} only")


def _first(keys: list[str]) -> str:
    return f"{', '.join(map(short, keys[:3]))}{', ...' if len(keys) > 3 else ''}"

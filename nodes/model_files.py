"""Model files as the host knows them: what can be chosen, where it is, and its tensors under their original names."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import comfy.utils
import folder_paths
import torch

from ..flowcache_core import models
from ..flowcache_core.models.checkpoint import ARCHITECTURE, Found, recognise
from ..flowcache_core.models.family import AUTO, ChunkLayout
from ..flowcache_core.models.quantised import FLOAT8, MARKER, restored, unstacked
from ..flowcache_core.models.shards import SHARD, open_checkpoint
from ..flowcache_core.untrusted import parsed, short
from . import gguf

FOLDER = "diffusion_models"
FORMATS = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}


@dataclass(frozen=True)
class ModelFile:
    """A recognised model that is ready to be put into the network.

    `operations`: layers that have to be used, or None for the host's choice; `patcher`: what the finished MODEL passes through.
    """

    weights: dict[str, torch.Tensor]
    found: Found
    layout: ChunkLayout
    files: tuple[Path, ...]
    operations: Any = None
    patcher: Callable[[Any], Any] | None = None


def choices() -> list[str]:
    """Files of models/diffusion_models; then, with a slash at the end, folders with a set of shards; then GGUF files."""
    names = folder_paths.get_filename_list(FOLDER)
    shards = [PurePath(name) for name in names if SHARD.fullmatch(PurePath(name).name)]
    folders = sorted({f"{path.parent.as_posix()}/" for path in shards if path.parent.name})
    found = (folder_paths.recursive_search(folder, [".git"])[0] for folder in folder_paths.get_folder_paths(FOLDER))
    ggufs = sorted({name for some in found for name in some if name.lower().endswith(gguf.SUFFIX)})
    return [*names, *folders, *ggufs]


def path_of(name: str) -> Path:
    """Raises FileNotFoundError for what is no longer there."""
    if not name.endswith("/"):
        return Path(folder_paths.get_full_path_or_raise(FOLDER, name))
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise FileNotFoundError(f"{short(name)} is no folder in models/{FOLDER}: refresh the page and choose again")
    for folder in folder_paths.get_folder_paths(FOLDER):
        if (path := Path(folder, name)).is_dir():
            return path
    raise FileNotFoundError(f"there is no folder {name} in models/{FOLDER}: refresh the page and choose again")


def open_model(path: Path, name: str, family: str = AUTO) -> ModelFile:
    """Raises ValueError, before weights are read, when this is not one whole model of a family that we know. `family`: what the user says it is."""
    if path.suffix.lower() == gguf.SUFFIX:
        return _open_gguf(path, name, family)
    checkpoint = open_checkpoint(path)
    found = recognise(checkpoint.stored, name, checkpoint.metadata, family)
    _require_agreement(found, name, checkpoint.metadata.get(ARCHITECTURE, ""))
    names = found.names
    weights = {names[key]: tensor for key, tensor in checkpoint.tensors(names, lambda file: comfy.utils.load_torch_file(str(file)))}
    logging.info(f"FlowCache: {name} is {found.release}, {len(checkpoint.files)} file{'s' * (len(checkpoint.files) > 1)}")
    weights = _marked(unstacked(weights, torch.bfloat16), checkpoint.metadata.get("_quantization_metadata"), names)
    return ModelFile(weights, found, found.family.layout_of(checkpoint.metadata), checkpoint.files)


def _require_agreement(found: Found, name: str, said: str) -> None:
    """Raises ValueError for a file that calls itself another family of ours than the user does."""
    other = next((one for one in models.FAMILIES if one.name == said), found.family)
    if other is not found.family:
        raise ValueError(f"{name} says that it is {other.title}, and the input family that it is {found.family.title}: set family to {AUTO}")


def _open_gguf(path: Path, name: str, family: str) -> ModelFile:
    pack = gguf.Pack(name)
    read, metadata = pack.read(path)
    found = recognise(read, name, metadata, family)
    _require_agreement(found, name, metadata.get(ARCHITECTURE, ""))
    weights = {new: read[key] for key, new in found.names.items()}
    logging.info(f"FlowCache: {name} is {found.release}, read by {gguf.PACK}")
    return ModelFile(pack.prepared(weights, found.matrices), found, found.family.layout_of(metadata), (path,), pack.operations(), pack.patcher)


def _marked(weights: dict[str, torch.Tensor], listed: str | None, names: dict[str, str]) -> dict[str, torch.Tensor]:
    """Scaled weights marked as the host's mixed-precision layers expect it: LAYER.weight_scale and LAYER.comfy_quant.

    `listed`: what the file's metadata says about its layers, under the names of the file.
    """
    for layer, how in (_json_object(listed, "layers") if listed else {}).items():
        if key := names.get(f"{layer}.weight"):
            weights[f"{key.removesuffix('.weight')}.comfy_quant"] = _mark(how)
    if any(key.endswith(".scale_weight") for key in weights):
        weights.setdefault(MARKER, torch.zeros(2, dtype=torch.float8_e4m3fn))  # two elements: multiply in full precision
    weights = comfy.utils.convert_old_quants(weights, "", None)[0]
    for scale in [key for key in weights if key.endswith(".weight_scale")]:
        layer = scale.removesuffix(".weight_scale")
        weight, mark = weights[f"{layer}.weight"], weights.get(f"{layer}.comfy_quant")
        if weight.ndim != 2:  # only matrices have a quantised layer
            weights[f"{layer}.weight"] = restored(f"{layer}.weight", weight, weights.pop(scale), torch.float32)
            weights.pop(f"{layer}.comfy_quant", None)
        elif weight.dtype in FLOAT8:
            how = {"full_precision_matrix_mult": True} if mark is None else _json_object(mark.numpy().tobytes().decode(errors="replace"))
            weights[f"{layer}.comfy_quant"] = _mark({**how, "format": FORMATS[weight.dtype]})
        elif mark is None:
            kind = str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"{layer}.weight is stored as {kind} with scales, and the file does not say in which format: use a bf16, fp16 or fp8 file"
            )
    return weights


def _json_object(text: str, part: str = "") -> dict[str, Any]:
    """What a file says of its quantised layers: a JSON object, or the object in its `part`. Raises ValueError."""
    try:
        values = parsed(text)
        values = values[part] if part else values
        if isinstance(values, dict):
            return values
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"what the file says of its quantised layers cannot be read ({short(text)!r}): download it again, or use a bf16 file")


def _mark(how: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(how).encode()), dtype=torch.uint8)

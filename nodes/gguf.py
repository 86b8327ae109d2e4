"""GGUF files, read and computed by the ComfyUI-GGUF pack where it is installed; nothing of the format is known here."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

import nodes

from ..flowcache_core.untrusted import short

PACK, NODE, SUFFIX = "ComfyUI-GGUF", "UnetLoaderGGUF", ".gguf"


class Pack:
    """What the installed pack offers. Raises ValueError when there is none."""

    def __init__(self, name: str) -> None:
        node = nodes.NODE_CLASS_MAPPINGS.get(NODE)
        if node is None:
            raise ValueError(f"{name} is a GGUF file, which {PACK} reads: install that node pack (ComfyUI Manager has it), or use a safetensors file")
        self._pack = sys.modules[node.__module__]

    def read(self, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """-> the pack's own tensors by key, whose `shape` is that of the values, and the file's metadata, which newer versions of the pack hand over.

        Raises ValueError where the pack returns anything else.
        """
        read = self._pack.gguf_sd_loader(str(path))
        match read if isinstance(read, tuple) else (read, {}):
            case dict() as weights, dict() as more:
                metadata = more.get("metadata") or {}
                return weights, {key: value for key, value in metadata.items() if isinstance(value, str)}
        raise ValueError(f"{path.name}: this version of {PACK} hands over {short(str(type(read)))}, which is not known here: use a safetensors file")

    def prepared(self, weights: dict[str, torch.Tensor], matrices: Collection[str]) -> dict[str, torch.Tensor]:
        """Matrices of linear layers stay as they are and are dequantised when used; everything else becomes plain float32."""
        plain = sys.modules[self._pack.gguf_sd_loader.__module__].dequantize_tensor
        return {k: v if k in matrices else plain(v, torch.float32).as_subclass(torch.Tensor).reshape(v.shape) for k, v in weights.items()}

    def operations(self) -> Any:
        return self._pack.GGMLOps()

    def patcher(self, model: Any) -> Any:
        """The MODEL with the pack's way of patching quantised weights."""
        return self._pack.GGUFModelPatcher.clone(model)

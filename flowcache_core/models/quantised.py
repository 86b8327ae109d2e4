"""Weights stored in few bits: which keys only accompany a weight, and what its values are.

Three conventions are known: `scaled_fp8` with `LAYER.scale_weight`, ComfyUI's `LAYER.weight_scale` with `LAYER.comfy_quant`, and that of
MAGI-1: a stack of one matrix with `LAYER.weight_scale`, and scales of the input's channels, `LAYER.smooth_scale` or `LAYER.input_scale`.
A plain fp8 file has no companions: its weights are simply rounded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor

MARKER = "scaled_fp8"
COMPANIONS = ("weight_scale", "weight_scale_2", "input_scale", "smooth_scale", "comfy_quant", "scale_weight", "scale_input")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Shaped(Protocol):
    """What a tensor and a slot of a file have in common."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


def is_companion(key: str, keys: Collection[str]) -> bool:
    """Whether a key describes a weight among `keys` instead of being one."""
    layer, _, last = key.rpartition(".")
    return key == MARKER or (last in COMPANIONS and f"{layer}.weight" in keys)


def plain_shapes(weights: Mapping[str, Shaped]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the values that are meant; companions left out.

    Four-bit weights lie two to a byte; a stack of one scaled matrix is the matrix.
    """
    shapes = {}
    for key, weight in weights.items():
        if is_companion(key, weights.keys()):
            continue
        shape = tuple(weight.shape)
        if len(shape) == 3 and shape[0] == 1 and f"{key.removesuffix('.weight')}.weight_scale" in weights:
            shape = shape[1:]
        packed = shape and key.endswith(".weight") and f"{key.removesuffix('.weight')}.weight_scale_2" in weights
        shapes[key] = (*shape[:-1], 2 * shape[-1]) if packed else shape
    return shapes


def scale_key(key: str, keys: Collection[str]) -> str | None:
    """The key of the scale that belongs to a weight."""
    layer = key.removesuffix(".weight")
    return next((k for k in (f"{layer}.weight_scale", f"{layer}.scale_weight") if k != key and k in keys), None)


def column_factors(key: str, scales: Mapping[str, Tensor]) -> Tensor | None:
    """By what the columns of a matrix count, [columns], where its layer divides every channel of the input by a number of its own.

    Such a layer rounds x / smooth, or x / input_scale where that has a number per channel, to fp8; the product is multiplied by input_scale,
    of which the kernel reads the first number.
    """
    layer = key.removesuffix(".weight")
    after, smooth = scales.get(f"{layer}.input_scale"), scales.get(f"{layer}.smooth_scale")
    if after is None or (smooth is None and after.numel() == 1):
        return None
    return after.float().flatten()[0] / (after if smooth is None else smooth).float().flatten()


def unstacked(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """A checkpoint as MAGI-1 stores fp8, in the form of others: a stack of one matrix becomes the matrix, with one scale.

    Where the columns of a matrix count differently no fp8 layer can say so: its values are written out in `dtype`.
    """
    out = dict(weights)
    for key in [key for key, weight in weights.items() if weight.ndim == 3 and len(weight) == 1 and scale_key(key, weights.keys())]:
        layer, columns = key.removesuffix(".weight"), column_factors(key, weights)
        for companion in ("input_scale", "smooth_scale"):
            out.pop(f"{layer}.{companion}", None)
        if columns is None or bool((columns == 1).all()):
            out[key], out[f"{layer}.weight_scale"] = weights[key][0], out[f"{layer}.weight_scale"].reshape(())
        else:
            out[key] = restored(key, weights[key], out.pop(f"{layer}.weight_scale"), dtype, columns)
    return out


def restored(key: str, weight: Tensor, scale: Tensor | None, dtype: torch.dtype | None, columns: Tensor | None = None) -> Tensor:
    """The values of a weight in `dtype` (None: as stored). `scale`: one number, or one per row; `columns`: as `column_factors` has them.

    Raises ValueError for a scaled weight that is not fp8: only the host can compute with those.
    """
    if scale is None:
        return weight if dtype is None else weight.to(dtype)
    if weight.ndim == 3 and len(weight) == 1:
        weight = weight[0]
    if weight.dtype not in FLOAT8 or scale.numel() not in (1, weight.shape[0]):
        raise ValueError(
            f"{key} is quantised as {str(weight.dtype).removeprefix('torch.')} with scales {tuple(scale.shape)}: "
            "outside ComfyUI only fp8 with one scale per tensor or row is read; use a bf16, fp16 or fp8 file"
        )
    values = weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))
    return (values if columns is None else values * columns).to(dtype or torch.float32)

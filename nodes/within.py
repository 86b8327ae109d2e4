"""Checks the inputs of a node against its schema before it runs: the host checks what is typed, not what comes by a link."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from comfy_api.latest import io

from ..flowcache_core.untrusted import short
from .mailbox import Mailbox


def within_schema(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    """For the `execute` of a node. It then raises ValueError, with the way out, for an input that the schema does not allow."""

    @functools.wraps(execute)
    def checked(cls: Any, **inputs: Any) -> io.NodeOutput:
        schema = cls.define_schema()
        rules = {one.id: one for one in schema.inputs}
        for name, value in inputs.items():
            if why := _error(rules, name, value):
                raise ValueError(f"{schema.display_name} {why}")
        return _signed(execute(cls, **inputs), schema.node_id)

    return checked


def _signed(out: io.NodeOutput, node: str) -> io.NodeOutput:
    """With what is shown goes whose it is: the page knows it by the node's number alone, which other workflows have too."""
    shown = out.ui.as_dict() if hasattr(out.ui, "as_dict") else out.ui
    if shown:
        out.ui = {**shown, "flowcache_node": [node]}
    return out


def _error(rules: Mapping[str, Any], name: str, value: Any) -> str:
    """The end of the message for an input that is not allowed; "" for one that is."""
    if name not in rules:
        return f"has no input {short(name)}: take what is connected to it away, or load the workflow anew"
    rule = rules[name]
    if value is None and rule.optional and rule.get_io_type() in TYPES:
        return ""
    requirement = _unmet(rule, value)
    return f"was given {name} {_description(value)}: {requirement}" if requirement else ""


def _unmet(rule: Any, value: Any) -> str:
    """The requirement of an input that the value does not meet; "" where it meets all."""
    match rule.get_io_type():
        case "INT" | "FLOAT" as kind:
            number = isinstance(value, Integral if kind == "INT" else Real) and not isinstance(value, bool)
            low, high = (-math.inf if rule.min is None else rule.min), (math.inf if rule.max is None else rule.max)
            return "" if number and math.isfinite(value) and low <= value <= high else f"it has to be a {NUMBERS[kind]} from {low} to {high}"
        case "BOOLEAN":
            return "" if isinstance(value, bool | int) and value in (0, 1) else "it has to be true or false"
        case "STRING":
            return "" if isinstance(value, str) else "it has to be a text"
        case "COMBO":
            return "" if str(value) in map(str, rule.options) else f"choose one of {short(', '.join(map(str, rule.options)), 300)}"
        case kind if kind in TYPES:
            is_valid, requirement = TYPES[kind]
            return "" if is_valid(value) else f"it has to be {requirement}"
    return ""


def _description(value: Any) -> str:
    """Of a value, for a message."""
    if isinstance(value, torch.Tensor):
        return f"of shape {tuple(value.shape)}"
    if value is None or isinstance(value, str | int | float):
        return short(repr(value))
    return f"of type {short(type(value).__name__)}"


def _is_latent(value: Any) -> bool:
    samples = value.get("samples") if isinstance(value, dict) else None
    return getattr(samples, "is_nested", False) or (isinstance(samples, torch.Tensor) and samples.is_floating_point() and samples.numel() > 0)


def _is_images(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 4 and value.numel() > 0 and value.shape[3] >= 3


def _is_conditioning(value: Any) -> bool:
    pairs = value if isinstance(value, list) else [None]
    return all(isinstance(one, list | tuple) and len(one) == 2 and _is_text(one[0]) and isinstance(one[1], dict) for one in pairs)


def _is_text(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 3


def _is_vae(value: Any) -> bool:
    return hasattr(value, "encode") and hasattr(value, "decode")


def _is_clip(value: Any) -> bool:
    return hasattr(value, "tokenize") and hasattr(value, "encode_from_tokens_scheduled")


NUMBERS = {"INT": "whole number", "FLOAT": "number"}
TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "LATENT": (_is_latent, "a latent with samples in it, such as that of Empty AR Video Latent or of a sampler"),
    "IMAGE": (_is_images, "one image or more in colour, frames x height x width x 3"),
    "CLIP": (_is_clip, "a text encoder, such as that of Load CLIP or Load AR Video Model"),
    "CONDITIONING": (_is_conditioning, "an encoded prompt, such as that of CLIP Text Encode"),
    "VAE": (_is_vae, "a VAE, such as that of Load AR Video Model or Load VAE"),
    "FLOWCACHE_REPORT": (lambda value: isinstance(value, Mailbox), "the report output of AR Chunk Sampler"),
}
"""By name of the host's type: whether a value is of it, and the requirement as a noun phrase."""

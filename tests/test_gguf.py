"""GGUF files through the pack that reads them, in both forms in which it hands them over; without a host and without that pack."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

WEIGHTS = {"blocks.0.ffn.0.weight": torch.ones(2, 2)}
PACK = "comfyui_gguf"


@pytest.fixture
def reads(nodes: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """What the pack's loader returns -> what comes of it."""

    def read(held: Any) -> Any:
        pack, host = ModuleType(PACK), ModuleType("nodes")
        pack.gguf_sd_loader = lambda path: held  # type: ignore[attr-defined]
        host.NODE_CLASS_MAPPINGS = {"UnetLoaderGGUF": SimpleNamespace(__module__=PACK)}  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, PACK, pack)
        monkeypatch.setitem(sys.modules, "nodes", host)
        return nodes("gguf").Pack("net.gguf").read(Path("models/net.gguf"))

    return read


@pytest.mark.parametrize(
    ("held", "metadata"),
    [
        (WEIGHTS, {}),
        ((WEIGHTS, {}), {}),
        ((WEIGHTS, {"arch_str": "wan", "metadata": {"architecture": "krea-realtime", "number": 3}}), {"architecture": "krea-realtime"}),
        ((WEIGHTS, {"metadata": None}), {}),
    ],
)
def test_weights_and_metadata_are_found_in_whatever_form(held: Any, metadata: dict[str, str], reads: Callable[[Any], Any]) -> None:
    weights, said = reads(held)
    assert weights is WEIGHTS
    assert said == metadata


@pytest.mark.parametrize("held", [None, (WEIGHTS, {}, 1), (None, {}), [WEIGHTS]])
def test_another_form_is_refused_with_a_sentence(held: Any, reads: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"net.gguf: this version of ComfyUI-GGUF hands over .* is not known here: use a safetensors file"):
        reads(held)

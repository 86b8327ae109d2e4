"""The released code of MAGI-1, imported from a checkout and run on the processor in float32.

`MAGI_PATH` names the checkout. What it imports and a processor has not, or what is not compared, stands in: compiled attention and fp8 products by
PyTorch, the Triton kernel of the gates by indexing, distributed groups of one process, T5, FFmpeg, diffusers and timm by nothing. Devices that it
names are the processor, autocast is off, and what it rounds to bfloat16 or fp8 stays as it is.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tests.released import importing, module, sdpa

CHECKOUT = os.environ.get("MAGI_PATH")
TEXT_DIM = 12
MODULES = ("common", "model.dit.dit_model", "model.dit.dit_module", "model.vae.vae_model", "pipeline.video_generate", "pipeline.prompt_process")
TOPS = {"inference", "triton", "flashinfer", "flash_attn", "ffmpeg", "diffusers", "timm"}
GROUPS = "get_tp_group", "get_pp_group", "get_cp_group", "get_dp_group"
NEEDS_RELEASED = pytest.mark.skipif(not CHECKOUT, reason="set MAGI_PATH to a checkout of the released MAGI-1 code to compare with it")


class OnProcessor(TorchFunctionMode):
    """Tensors that ask for a GPU are made on the processor, or stay there, and none is rounded to bfloat16 or fp8."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cuda, Tensor.bfloat16) or (func is Tensor.to and torch.float8_e4m3fn in args):
            return args[0]
        kwargs = dict(kwargs or {})
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = "cpu"
        return func(*["cpu" if isinstance(arg, str) and arg.startswith("cuda") else arg for arg in args], **kwargs)


def attend_packed(qkv: Tensor, **_: Any) -> Tensor:
    return sdpa(*qkv.unbind(2))


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **_: Any) -> Tensor:
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    spans = zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True)
    return torch.cat([sdpa(q[None, a:b], k[None, c:d], v[None, c:d])[0] for a, b, c, d in spans])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, T, heads, head_dim] by angles [T, n]: channels i and i + n are a pair."""
    n, cos, sin = cos.shape[-1], cos[:, None], sin[:, None]
    first, second = x[..., :n], x[..., n : 2 * n]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, x[..., 2 * n :]], -1)


def gate(x: Tensor, which: Tensor, gates: Tensor) -> Tensor:
    """[T, B, d] by gates [B, F, d], of which `which` [T, B] counts through both first axes."""
    return x * gates.flatten(0, 1)[which]


def fp8_product(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: Any) -> Tensor:
    return (x.float() @ weight.float()) * x_scale.flatten()[0] * weight_scale


def silu_and_mul(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return F.silu(x[..., :half]) * x[..., half:]


class Anything(ModuleType):
    """A module of which every name is nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return SimpleNamespace()


def stand_ins() -> dict[str, ModuleType]:
    activation, gemm = SimpleNamespace(silu_and_mul=silu_and_mul), module("flashinfer.gemm", bmm_fp8=fp8_product)
    language = module("triton.language", constexpr=int)
    return {
        "triton": module("triton", jit=lambda f: f, language=language),
        "triton.language": language,
        "flashinfer": module("flashinfer", activation=activation, gemm=gemm),
        "flashinfer.gemm": gemm,
        "flash_attn": module("flash_attn", flash_attn_varlen_func=attend_varlen, flash_attn_func=sdpa, flash_attn_qkvpacked_func=attend_packed),
        "flash_attn.flash_attn_interface": module("flash_attn.flash_attn_interface", flash_attn_func=sdpa),
        "flash_attn.layers": module("flash_attn.layers"),
        "flash_attn.layers.rotary": module("flash_attn.layers.rotary", apply_rotary_emb=rotate),
        "inference.model.t5": module("inference.model.t5", T5Embedder=None),
        "ffmpeg": Anything("ffmpeg"),
        "diffusers": module("diffusers", ModelMixin=nn.Module, ConfigMixin=type("ConfigMixin", (), {})),
        "diffusers.configuration_utils": module("diffusers.configuration_utils", register_to_config=lambda f: f),
        "timm": module("timm"),
        "timm.models": module("timm.models"),
        "timm.models.layers": module("timm.models.layers", to_2tuple=lambda n: (n, n), trunc_normal_=nn.init.trunc_normal_),
    }


def write_special_tokens(path: Path) -> Path:
    """A file as `special_tokens.npz` of the release, of another width."""
    rng = np.random.default_rng(7)
    np.savez(
        path, caption_token=rng.normal(size=(1, TEXT_DIM)), logo_token=rng.normal(size=(1, TEXT_DIM)), other_tokens=rng.normal(size=(100, TEXT_DIM))
    )
    return path


class Released:
    """The modules of a checkout, to be used within `running`. `special_tokens`: the file that it reads."""

    common: Any
    dit_model: Any
    dit_module: Any
    vae_model: Any
    video_generate: Any
    prompt_process: Any

    def __init__(self, checkout: Path, special_tokens: Path) -> None:
        self.checkout, self.special_tokens = checkout, special_tokens
        with pytest.MonkeyPatch.context() as patch, self.running(), warnings.catch_warnings(), importing(checkout, stand_ins(), TOPS):
            warnings.simplefilter("ignore")
            patch.setenv("SPECIAL_TOKEN_PATH", str(special_tokens))
            for name in MODULES:
                setattr(self, name.rpartition(".")[2], importlib.import_module(f"inference.{name}"))
            self._groups = importlib.import_module("inference.infra.distributed.parallel_state")
        self.dit_module.range_mod_triton = gate

    @contextmanager
    def running(self, **settings: str) -> Iterator[None]:
        """What the released code asks of the machine, and of its environment: as in its published runs, and `settings`."""
        with pytest.MonkeyPatch.context() as patch, OnProcessor(), torch.inference_mode():
            for name, value in {"PAD_HQ": "1", "PAD_DURATION": "1", **settings}.items():
                patch.setenv(name, value)
            for name, says in {"current_device": 0, "get_device_capability": (8, 0), "synchronize": None, "empty_cache": None}.items():
                patch.setattr(torch.cuda, name, lambda *_, says=says: says)
            for name, says in {"get_rank": 0, "get_world_size": 1, "barrier": None}.items():
                patch.setattr(torch.distributed, name, lambda *_, says=says, **__: says)
            patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
            patch.setattr(torch, "compile", lambda function, **_: function)
            for name in GROUPS if hasattr(self, "_groups") else ():
                patch.setattr(self._groups, name, lambda *_, **__: None)
            yield

"""Preview of a film during sampling: decoded by the host's VAE where there is memory for it beside the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ..flowcache_core.run.footprint import readable
from .page import Page
from .partial_film import PartialFilm
from .vae_pieces import decoder_of


@dataclass(frozen=True)
class FilmPreview:
    """Settings of the preview. `clean`: finished latents of the sampler -> latents of the host; `fps`: of the film."""

    vae: Any
    clean: Callable[[torch.Tensor], torch.Tensor]
    fps: int

    def start(self, page: Page, run: str, film: torch.Size) -> PartialFilm:
        """For latents of this shape [films, C, F, h, w]; of several films the first is shown."""
        shape = torch.Size((1, *film[1:]))
        pieces, go_on = decoder_of(self.vae, shape, self.clean), comfy.model_management.throw_exception_if_processing_interrupted
        return PartialFilm(pieces, page, run, self.fps, lambda: hindrance(self.vae, shape), go_on)


def hindrance(vae: Any, shape: torch.Size) -> str:
    """Why latents of this shape are not decoded now: the host would move the running network out of the way. "" where there is room for both."""
    host = comfy.model_management
    others = any(one.device == vae.device and one.model is not vae.patcher for one in host.current_loaded_models)
    if host.DISABLE_SMART_MEMORY and others and not host.is_device_cpu(vae.device):
        return "ComfyUI was started with --disable-smart-memory, and would unload the model for it"
    weights = 0 if any(one.model is vae.patcher for one in host.current_loaded_models) else vae.patcher.model_size()
    wanted = 1.1 * weights + max(host.minimum_inference_memory(), vae.memory_used_decode(shape, vae.vae_dtype) + host.extra_reserved_memory())
    free = host.get_free_memory(vae.device)
    return "" if free >= wanted else f"that needs {readable(int(wanted))} of free memory, and {readable(int(free))} are free"

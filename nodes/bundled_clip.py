"""A bundled model's text encoder as a CLIP, so that the stock CLIP Text Encode works with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.sd
import torch

from ..flowcache_core.models.family import Bundled


class WordTokenizer:
    """Keeps the prompt as it is: the encoder reads words, not numbers."""

    def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **unused: Any) -> dict[str, Any]:
        return {"words": [[(text, 1.0)]]}

    def state_dict(self) -> dict[str, Any]:
        return {}


class WordEncoder(torch.nn.Module):
    """`encode`: (prompt, channels) -> [1, words, channels]; `dim`: channels."""

    def __init__(self, encode: Callable[[str, int], torch.Tensor], dim: int, dtype: Any = None, device: Any = None,
                 model_options: Any = None) -> None:  # fmt: skip
        super().__init__()
        self.encode, self.dim, self.dtypes = encode, dim, [torch.float32]

    def set_clip_options(self, options: dict[str, Any]) -> None: ...

    def reset_clip_options(self) -> None: ...

    def load_sd(self, sd: dict[str, Any]) -> tuple[list[str], list[str]]:
        return [], []

    def encode_token_weights(self, tokens: dict[str, Any]) -> tuple[torch.Tensor, None]:
        prompt = " ".join(text for batch in tokens["words"] for text, _ in batch)
        return self.encode(prompt, self.dim).to(comfy.model_management.intermediate_device()), None


class _Target:
    def __init__(self, bundled: Bundled, dim: int) -> None:
        self.params, self.clip, self.tokenizer = {"encode": bundled.encode, "dim": dim}, WordEncoder, WordTokenizer


def bundled_clip(bundled: Bundled, dim: int) -> comfy.sd.CLIP:
    """`dim`: channels of the text embeddings that the network takes."""
    return comfy.sd.CLIP(_Target(bundled, dim))

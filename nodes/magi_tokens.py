"""MAGI Special Tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..flowcache_core.models.magi_text import prompt_text, read_special_tokens
from .shown_text import SHOWS_TEXT
from .texts import DURATIONS, MASK
from .within import within_schema

NODE = "MAGI Special Tokens"
FOLDER, SUFFIX = "text_encoders", ".npz"
NONE = "none"
NO_FILE = "put special_tokens.npz into models/text_encoders"
TOKENS = "flowcache_tokens"
"""Key of a conditioning: the traits that stand in front of its text."""

Conditioning = list[list[Any]]


def files() -> list[str]:
    """Files of models/text_encoders that may hold tokens; the host lists weights only."""
    found = (folder_paths.recursive_search(folder, [".git"])[0] for folder in folder_paths.get_folder_paths(FOLDER))
    return sorted({name for some in found for name in some if name.lower().endswith(SUFFIX)})


class MagiSpecialTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCacheMagiTokens",
            display_name=NODE,
            category="FlowCache",
            **SHOWS_TEXT,
            description="Puts the learned tokens of MAGI-1 in front of a prompt: high quality, chunks still to come, what the film is.",
            search_aliases=["magi", "prompt", "conditioning"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="A prompt, encoded by T5-v1.1-xxl (Load CLIP, type pixart)."),
                io.Combo.Input("file", options=files() or [NO_FILE],
                               tooltip="example/assets/special_tokens.npz of the MAGI-1 repository, in models/text_encoders."),
                io.Boolean.Input("quality", default=True, tooltip="High quality. On in the released settings."),
                io.Boolean.Input("duration", default=True,
                                 tooltip="How many chunks are still to come, anew for every chunk. On in the released settings."),
                io.Combo.Input("motion", options=[NONE, "static", "dynamic"], tooltip="Whether the first frames stand still or move."),
                io.Combo.Input("style", options=[NONE, "3d", "2d"], advanced=True, tooltip="3d: rendered; 2d: drawn."),
                io.Boolean.Input("border", default=False, advanced=True, tooltip="Bars around the picture."),
            ],
            outputs=[io.Conditioning.Output(tooltip="For the positive input of CFGGuider, or for BasicGuider.")],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, conditioning: Conditioning, file: str, quality: bool, duration: bool, motion: str, style: str, border: bool) -> io.NodeOutput:
        if file == NO_FILE:
            raise ValueError(f"{NODE}: {NO_FILE}; it is example/assets/special_tokens.npz of the MAGI-1 repository")
        special = read_special_tokens(Path(folder_paths.get_full_path_or_raise(FOLDER, file)))
        traits = [*["hq"] * quality, *(one for one in (motion, style) if one != NONE), *["border"] * border]
        out = []
        for text, extra in conditioning:
            if TOKENS in extra:
                raise ValueError(f"{NODE}: tokens stand in front of this prompt already ({', '.join(extra[TOKENS])}): use the node once for a prompt")
            rest = {key: value for key, value in extra.items() if key != MASK}
            more = {TOKENS: tuple(traits), **({DURATIONS: special.durations} if duration else {})}
            out.append([prompt_text(text, special, traits, extra.get(MASK)), {**rest, **more}])
        return io.NodeOutput(out, ui=ui.PreviewText(_summary([text for text, _ in out], traits, duration)))


def _summary(texts: list[torch.Tensor], traits: list[str], duration: bool) -> str:
    rows = " and ".join(str(text.shape[1] + duration) for text in texts)
    front = ["chunks to come"] * duration + traits
    return f"in front: {', '.join(front) or 'nothing'}; {rows} tokens of text in all"

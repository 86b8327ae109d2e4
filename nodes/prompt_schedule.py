"""Prompt Schedule."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..flowcache_core.sampling.prompts import ScheduledPrompt, read_prompts
from ..flowcache_core.untrusted import short
from .settings_on_model import PROMPTS_NODE
from .shown_text import SHOWS_TEXT
from .texts import scheduled
from .within import within_schema

NODE = PROMPTS_NODE
EXAMPLE = "1: a cat sits on a roof at dawn\n4: the cat jumps onto a wall"
KEPT, ANEW = "off", "at every change"


class PromptSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCachePromptSchedule",
            display_name=NODE,
            category="FlowCache",
            **SHOWS_TEXT,
            description="Prompts that change while a film goes on, each from a chunk on. In place of CLIP Text Encode, for AR Chunk Sampler, and for "
            "Sampler AR Video with KV Compressor.",
            search_aliases=["prompt travel", "prompt switch", "longlive", "long video", "text per chunk"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.String.Input("schedule", multiline=True, dynamic_prompts=True, default=EXAMPLE,
                                tooltip="A line for each prompt: the chunk from which on it counts, a colon, the prompt. The first chunk is 1, as in "
                                        "the report; a chunk is what Sampler AR Video calls a block, and given frames are chunks too. A line without "
                                        "a number goes on with the prompt above."),
                io.Combo.Input("recache", options=[KEPT, ANEW], default=KEPT, optional=True,
                               tooltip="For few-step causal models. at every change: what is kept of history is evaluated once more with the new "
                                       "prompt, one evaluation for each chunk of which something is left, so that history does "
                                       "not hold on to the old prompt. off: history stays as the old prompts have made it."),
            ],
            outputs=[io.Conditioning.Output(tooltip="For the guider, as its positive or negative input.")],
        )  # fmt: skip

    @classmethod
    @within_schema
    def execute(cls, clip: Any, schedule: str, recache: str = KEPT) -> io.NodeOutput:
        prompts = read_prompts(schedule)
        out = [encoded(clip, prompt.text) for prompt in prompts]
        if len(prompts) > 1:
            out = [scheduled(*one, prompt.first, recache == ANEW) for prompt, one in zip(prompts, out, strict=True)]
        return io.NodeOutput(out, ui=ui.PreviewText("\n".join(lines(prompts))))


def encoded(clip: Any, prompt: str) -> list[Any]:
    """The one entry of a prompt's CONDITIONING: a text, and what else it has. Raises ValueError for an encoder that makes several of one prompt."""
    made = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    if len(made) != 1:
        raise ValueError(
            f"{NODE}: this CLIP makes {len(made)} texts of one prompt, for parts of the steps, and a chunk is given one: take the hooks off it that "
            "change over the steps"
        )
    entry: list[Any] = made[0]
    return entry


def lines(prompts: tuple[ScheduledPrompt, ...]) -> list[str]:
    """The schedule in words."""
    return [f"from chunk {prompt.first + 1} on: {short(prompt.text, 80)}" for prompt in prompts]

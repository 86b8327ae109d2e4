"""A prompt schedule: which prompt counts from which chunk on. What prompts become, the model's text encoder knows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .schedule import ChunkSchedule

LINE = re.compile("\\s*(\\d{1,9})\\s*[:\uff1a](.*)", re.DOTALL)
"""The second colon is that of Chinese and Japanese keyboards."""


@dataclass(frozen=True, slots=True)
class ScheduledPrompt:
    """`first`: index of the chunk from which on it counts, from 0."""

    first: int
    text: str


def read_prompts(text: str) -> tuple[ScheduledPrompt, ...]:
    """From lines `chunk: prompt`, with chunks counted from 1; a line without a number goes on with the prompt above it.

    Text in front of the first number is the prompt of chunk 1. Raises ValueError, with the way out, for what is no schedule.
    """
    prompts: list[tuple[int, list[str]]] = []
    for line in filter(str.strip, text.splitlines()):
        if numbered := LINE.fullmatch(line):
            prompts.append((int(numbered[1]), [numbered[2]]))
        elif prompts:
            prompts[-1][1].append(line)
        else:
            prompts.append((1, [line]))
    _require([number for number, _ in prompts])
    read = tuple(ScheduledPrompt(number - 1, "\n".join(line.strip() for line in lines).strip()) for number, lines in prompts)
    if empty := next((one for one in read if not one.text), None):
        raise ValueError(f"there is no prompt behind {empty.first + 1}: in the schedule; write one, or take the line out")
    return read


def _require(numbers: Sequence[int]) -> None:
    if not numbers:
        raise ValueError("the prompt schedule is empty: write a line for each prompt, such as 1: a cat on a roof")
    if numbers[0] != 1:
        raise ValueError(f"the first prompt of the schedule is for chunk {numbers[0]}, and chunks count from 1: begin with a line 1:")
    if (found := next((pair for pair in pairwise(numbers) if pair[0] >= pair[1]), None)) is not None:
        raise ValueError(f"the prompt schedule has chunk {found[1]} after chunk {found[0]}: give every chunk one line, in order")


def require_chunks(firsts: Iterable[int], schedule: ChunkSchedule) -> None:
    """Raises ValueError for prompts, by the chunks from which on they count, that lie beyond the film."""
    if (beyond := max(firsts, default=0)) >= schedule.chunks:
        frames = schedule.pixels.pixel(schedule.frames)
        raise ValueError(
            f"the prompt schedule has a prompt for chunk {beyond + 1}, and a film of {frames} frames has {schedule.chunks} chunk"
            f"{'s' * (schedule.chunks > 1)} of {schedule.chunk_frames} latent frame{'s' * (schedule.chunk_frames > 1)}: make the film longer, or "
            "take that line out"
        )


def forecast_prompts(firsts: Iterable[int], schedule: ChunkSchedule) -> tuple[str, ...]:
    """Says where a prompt changes, in frames of the film; () where none does."""
    places = [f"chunk {first + 1} (frame {_frame(schedule, first)})" for first in sorted(set(firsts) - {0})]
    return (f"the prompt changes at {', '.join(places)}",) if places else ()


def _frame(schedule: ChunkSchedule, index: int) -> int:
    """The first frame of a chunk, counted from 1."""
    start = schedule.span(index)[0]
    return schedule.pixels.pixel(start) + 1 if start else 1

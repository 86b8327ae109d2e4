"""What MAGI-1 reads beside a prompt's own words: learned tokens in front, one of which changes from chunk to chunk, and the null caption.

A text is a tensor [films, words, channels] of which every row is read: padding is cut off here. The prompt's words are those of
T5-v1.1-xxl. The learned tokens lie in `special_tokens.npz` of the released code, the null caption in the network's checkpoint.
Released settings: `hq` in front of every prompt, and in front of that how many chunks are still to come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..sampling.chunk import Chunk
from ..untrusted import array_file, short

WORDS = 800
"""Rows that the network has learnt to read, with those in front."""
NULL_WORDS = 50
"""Rows of the null caption that are read."""
DURATIONS = 8
"""Numbers of chunks to come that are known: 0 to 6, and 7 or more."""
DURATION_ROW = 7
TRAITS = {"static": 2, "dynamic": 3, "border": 4, "hq": 1, "3d": 15, "2d": 16}
"""What can be said of a film, and its row among the learned tokens; in the order in which they are put in front, the last the foremost.

static, dynamic: the first frames; border: bars around the picture; hq: high quality; 3d: rendered; 2d: drawn."""
TRANSITION_ROW = 0
KEYS = ("caption_token", "logo_token", "other_tokens")
ROWS = 1 + max(DURATION_ROW + DURATIONS - 1, *TRAITS.values())
MEMBERS, BYTES = 16, 64 << 20
"""Of a file with learned tokens no more is read; the released one has 3 arrays in 3 MB."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Learned tokens. caption, logo: [channels], for writing in the picture; others: [n, channels], by `TRAITS` and the rows above."""

    caption: Tensor
    logo: Tensor
    others: Tensor

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]], name: str) -> SpecialTokens:
        """Values are rounded to float16, as released. Raises ValueError, with the name of the file, for arrays that are not those of MAGI-1."""
        shapes = [tuple(arrays[key].shape) if key in arrays else None for key in KEYS]
        caption, logo, others = shapes
        if not others or len(others) != 2 or others[0] < ROWS or others[1] < 1 or caption != logo or caption != (1, others[1]):
            found = ", ".join(f"{key} {'is missing' if shape is None else shape}" for key, shape in zip(KEYS, shapes, strict=True))
            raise ValueError(
                f"{name} does not hold the special tokens of MAGI-1, which are two rows and at least {ROWS} more of the same width ({found}): "
                "use example/assets/special_tokens.npz of the MAGI-1 repository"
            )
        wrong = [key for key in KEYS if not (np.abs(arrays[key].astype(np.float64)) <= np.finfo(np.float16).max).all()]
        if wrong:
            raise ValueError(f"{name} is damaged: {wrong[0]} has values that are no numbers or too large; download it again")
        first, second, rest = (torch.from_numpy(arrays[key].astype(np.float16)).float() for key in KEYS)
        return cls(first[0], second[0], rest)

    @property
    def channels(self) -> int:
        return self.others.shape[1]

    @property
    def durations(self) -> Tensor:
        """[8, channels]; row n for n chunks to come, the last one for that many or more."""
        return self.others[DURATION_ROW : DURATION_ROW + DURATIONS]

    @property
    def unwanted(self) -> Tensor:
        """What a film shall not show, foremost first: bars around it, cuts, logos, captions [4, channels]."""
        return torch.stack([self.others[TRAITS["border"]], self.others[TRANSITION_ROW], self.logo, self.caption])

    def front(self, traits: Sequence[str]) -> Tensor:
        """Tokens of `traits` in the order in which they are read, [n, channels]. Raises ValueError for a trait that there is not."""
        unknown = [trait for trait in traits if trait not in TRAITS]
        if unknown:
            raise ValueError(f"MAGI-1 has no token for {short(unknown[0])!r}: choose from {', '.join(TRAITS)}")
        rows = [row for trait, row in TRAITS.items() if trait in traits]
        return self.others[rows[::-1]]

    def text_of(self, text: Tensor, chunk: Chunk, chunks: int) -> Tensor:
        """A prompt's text, and in front of it how many chunks come after `chunk`, as `ChunkTexts` has it: [films, 1 + words, channels]."""
        to_come = chunks_to_come(chunk, chunks)
        return before(text, self.durations[to_come : to_come + 1])


def read_special_tokens(path: str | Path) -> SpecialTokens:
    """Raises ValueError for a file that cannot be read, or holds something else."""
    file = Path(path)
    return SpecialTokens.of(array_file(file, MEMBERS, BYTES), short(file.name))


def prompt_text(embeddings: Tensor, special: SpecialTokens, traits: Sequence[str] = ("hq",), mask: Tensor | None = None) -> Tensor:
    """Output of T5 [films, words, channels] -> text with the tokens of `traits` in front.

    `mask` [films, words]: nonzero where there are words and no padding; looking at it waits for its device. Raises ValueError for more than
    800 rows with all tokens, that of the duration too, for prompts of a batch that differ in length, and for another width.
    """
    words = embeddings if mask is None else without_padding(embeddings, mask)
    front = special.front(traits)
    rows, tokens = words.shape[1], len(front) + 1
    if rows + tokens > WORDS:
        raise ValueError(
            f"the prompt has {rows} tokens of text, with {tokens} special ones in front {rows + tokens}: MAGI-1 reads at most {WORDS}, "
            f"so shorten it by {rows + tokens - WORDS}"
        )
    return before(words, front)


def without_padding(text: Tensor, mask: Tensor) -> Tensor:
    """Text [films, words, channels] as far as the `mask` [films, words] is nonzero; looking at it waits for its device.

    Raises ValueError for a mask of another text, for prompts of a batch that differ in length, and for padding in front.
    """
    if tuple(mask.shape) != tuple(text.shape[:2]):
        raise ValueError(
            f"the text has {text.shape[1]} tokens and its mask {mask.shape[-1]}, so texts were joined and padding cannot be cut off: give the prompt "
            "as one text, or load the text encoder as a type that does not pad (pixart)"
        )
    return text[:, : _length(mask)]


def null_text(null_caption: Tensor, special: SpecialTokens | None = None) -> Tensor:
    """The network's `null_caption_embedding` [800, channels] -> the text that stands for none, [1, 50, channels].

    `special`: also says what the film shall not show; these tokens push as many rows out at the end.
    """
    text = null_caption[None] if special is None else before(null_caption[None], special.unwanted)
    return text[:, :NULL_WORDS]


def chunks_to_come(chunk: Chunk, chunks: int) -> int:
    """Row of the duration: chunks of the film after this one, 7 at most."""
    return min(chunks - chunk.index - 1, DURATIONS - 1)


def before(text: Tensor, tokens: Tensor) -> Tensor:
    """text [films, words, channels] behind tokens [n, channels]. Raises ValueError for another width."""
    if text.shape[2] != tokens.shape[1]:
        raise ValueError(
            f"the text has {text.shape[2]} channels and the special tokens of MAGI-1 {tokens.shape[1]}: use the text encoder T5-v1.1-xxl (t5xxl)"
        )
    return torch.cat([tokens.to(text).expand(len(text), -1, -1), text], 1)


def _length(mask: Tensor) -> int:
    """How many words every prompt has. Raises ValueError where they differ, or padding is in front."""
    lengths = [[place for place, read in enumerate(row) if read] for row in mask.tolist()]
    counts = {len(places) for places in lengths}
    if len(counts) > 1:
        raise ValueError(f"the prompts of a batch have {min(counts)} to {max(counts)} tokens of text: make their films one by one")
    if any(places != list(range(len(places))) for places in lengths):
        raise ValueError("the mask of the text has words behind padding: MAGI-1 takes the padding behind the words")
    return counts.pop()

"""A film decoded piece by piece, so that no more than a piece of it is ever held, also while it grows. What decodes it is unknown here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Decode = Callable[[Tensor], Tensor]
"""Latents [1, C, F, h, w] -> frames [T, H, W, 3] in 0..1."""
AT_ONCE = 2
"""Latent frames of a piece where the decoder remembers the one before: as many as ComfyUI's Wan VAE takes itself."""
TAKE, BEFORE, AFTER = 8, 4, 2
"""Latent frames that an overlapping piece is good for, and that it sees before and after these."""


class Pieces(Protocol):
    """Decodes one film from its beginning to its end. `done`: the latent frames that have been decoded."""

    done: int

    def next(self, latents: Tensor, ready: int) -> Tensor | None:
        """The next frames [T, H, W, 3] of latents [1, C, F, h, w] whose first `ready` frames are finished; None where more have to be finished."""
        ...


@dataclass
class InSuccession:
    """`step` carries what a causal decoder remembers from piece to piece: wherever the pieces end, they are the film decoded whole.

    The first latent frame comes alone, as it stands for a single frame of film.
    """

    step: Decode
    done: int = 0

    def next(self, latents: Tensor, ready: int) -> Tensor | None:
        begin, self.done = self.done, min(self.done + (AT_ONCE if self.done else 1), max(ready, self.done))
        return self.step(latents[:, :, begin : self.done]) if begin < self.done else None


@dataclass
class Overlapping:
    """Each piece is decoded anew with some latent frames around it, and these are cut off. At the joints the film may differ a little from one
    that was decoded whole.

    `frames`: how many frames of film so many latent frames become, 0 of 0.
    """

    decode: Decode
    frames: Callable[[int], int]
    done: int = 0

    def next(self, latents: Tensor, ready: int) -> Tensor | None:
        """Raises ValueError for a decoder that makes another number of frames."""
        end = min(self.done + TAKE, ready if ready == latents.shape[2] else ready - AFTER)
        if end <= self.done:
            return None
        first, last = max(self.done - BEFORE, 0), min(end + AFTER, ready)
        film, count = self.decode(latents[:, :, first:last]), self.frames(last - first)
        if len(film) != count:
            raise ValueError(
                f"this VAE made {len(film)} frames of {last - first} latent frames instead of {count}: is it the VAE of the model? "
                "If so, use VAE Decode and connect images"
            )
        begin, self.done = self.done, end
        return film[self.frames(begin - first) : self.frames(end - first)]


@dataclass
class InTiles:
    """Pieces of one tile each, of a decoder whose tiles have no frames in common: the film is exactly the one that is decoded whole.

    `size`: latent frames of a tile. What is left at the end, and fills none, goes with the tile before it.
    """

    decode: Decode
    size: int
    done: int = 0

    def next(self, latents: Tensor, ready: int) -> Tensor | None:
        total = latents.shape[2]
        last = max(total // self.size - 1, 0) * self.size
        begin, end = self.done, self.done + self.size if self.done < last else total
        if begin == end or end > ready:
            return None
        self.done = end
        return self.decode(latents[:, :, begin:end])


def all_of(pieces: Pieces, latents: Tensor) -> Iterator[Tensor]:
    """Latents [1, C, F, h, w] of a film that is finished -> its frames, piece by piece."""
    while (piece := pieces.next(latents, latents.shape[2])) is not None:
        yield piece

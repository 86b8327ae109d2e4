"""Pixel frames and latent frames."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Frames:
    """How a VAE counts: the first latent frame holds `first` pixel frames, every other one `each`. (4, 1): films of 4n + 1 frames; (4, 4): of 4n."""

    each: int = 4
    first: int = 1

    def latent(self, pixels: int) -> int:
        """Latent frames of so many pixel frames, rounded down; at least 1 where there is one frame."""
        return (pixels - self.first) // self.each + 1 if pixels >= self.first else min(pixels, 1)

    def pixel(self, latents: int) -> int:
        """Pixel frames of so many latent frames."""
        return (latents - 1) * self.each + self.first

    def require(self, pixels: int) -> int:
        """-> latent frames. Raises ValueError, with the nearest that work, for a number of frames that does not divide."""
        if pixels < self.first or (pixels - self.first) % self.each:
            below = max(pixels - self.first, 0) // self.each * self.each + self.first
            rest = self.first % self.each
            raise ValueError(f"{pixels} frames are not {self.each}n{f' + {rest}' if rest else ''}: use {below} or {below + self.each}")
        return self.latent(pixels)

    def nearest(self, pixels: int, chunk_frames: int) -> tuple[int, int]:
        """Lengths around `pixels` that fill whole chunks: 97 frames at chunk 4 -> (93, 109)."""
        chunk, over = chunk_frames * self.each, self.each - self.first
        below = max((pixels + over) // chunk, 1) * chunk - over
        return (below, below) if below == pixels else (below, below + chunk)


FOUR_N_PLUS_1 = Frames(4, 1)
"""As the Wan VAE counts."""
FOUR_N = Frames(4, 4)
"""As the MAGI-1 VAE counts."""

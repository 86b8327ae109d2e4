"""How far latents have changed; maps of tokens: how far every token differs from the frame before, scaled to weights; masks laid over latents.

A token is a patch of so many cells of one latent frame, given as (height, width). Token maps are [F, h / height, w / width] and
flatten in the order frame, row, column.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TINY = 1e-8


def frame_difference(now: Tensor, before: Tensor | None, relative: bool = False) -> Tensor:
    """[B, C, F, h, w] and the frame before it [B, C, h, w], or None -> [F, h, w]: mean |difference| over batch and channels.

    Without a frame before it, the first frame takes the difference of the second (ones where there is no second).
    `relative` divides by the magnitude of the frame before, cell by cell (MotionCache's form for block outputs).
    """
    now = now.float()
    first = now[:, :, :1] if before is None else before.float().unsqueeze(2)
    past = torch.cat([first, now[:, :, :-1]], 2)
    out = (now - past).abs().mean(1)
    if relative:
        out = out / (past.abs().mean(1) + TINY)
    out = out.mean(0)
    if before is not None:
        return out
    return torch.cat([out[1:2], out[1:]]) if len(out) > 1 else torch.ones_like(out)


def relative_change(now: Tensor, before: Tensor) -> Tensor:
    """mean|now - before| / mean|before|, a scalar (FlowCache, section 3.1: the relative L1 distance)."""
    return (now - before).abs().mean() / before.abs().mean().clamp_min(1e-12)


def pooled(cells: Tensor, patch: tuple[int, int]) -> Tensor:
    """[F, h, w] -> a token map: the mean over each token's cells."""
    return cells if patch == (1, 1) else F.avg_pool2d(cells, patch)


def spread(tokens: Tensor, patch: tuple[int, int]) -> Tensor:
    """A token map -> [F, h, w] of latent cells."""
    return tokens.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)


def normalised(motion: Tensor, quantile: float = 1.0, together: bool = False) -> Tensor:
    """[F, h, w] -> 0..1 between the least and the most of each frame, or of all frames `together`.

    What lies above `quantile` counts as the most. Where nothing differs all of it counts as the most, so that nothing
    is held back on no evidence (MotionCache, section 4.2, equation 12).
    """
    flat = motion.flatten()[None] if together else motion.flatten(1)
    least, most = flat.amin(1, keepdim=True), flat.quantile(quantile, 1, keepdim=True) if quantile < 1 else flat.amax(1, keepdim=True)
    scaled = ((flat - least) / (most - least).clamp_min(TINY)).clamp_max(1)
    return torch.where(most - least > TINY, scaled, torch.ones_like(scaled)).view_as(motion)


def mask_over(value: Tensor, tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """True at the tokens of the list [n], in a shape that broadcasts with `value`: [B, C, F, h, w] or [B, T, d]."""
    frames, height, width = grid
    chosen = torch.zeros(frames * height * width, dtype=torch.bool, device=value.device).index_fill_(0, tokens, True)
    if value.ndim == 3:
        return chosen.view(1, -1, 1)
    return spread(chosen.view(grid), (value.shape[3] // height, value.shape[4] // width))[None, None]

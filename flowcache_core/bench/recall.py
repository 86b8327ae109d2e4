"""`bench recall`: whether the measures of motion find what moved, on procedural clips where that is known.

A true clip is encoded and noised along the straight path to the levels of the schedule, with one noise per clip, and the
network says its velocity at each, block-causal over the whole film. At a step every measure ranks the tokens of a chunk
from what is known before that step runs, as Motion Cache does. Two questions: among the first 20, 40 and 60 % of the
ranking, how many of the tokens are found whose pixels changed in the clip; and how well does the ranking agree with the
true change of the velocity from the step before to this one (Spearman), which is what a replay would get wrong.
Clips in which nothing moves, or nearly everything does, are left out: there is nothing to rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..kernels.tokens import frame_difference, normalised, pooled
from ..models.adapter import Call, require_tokens
from ..models.attention import BlockCausal
from ..models.bundle import Bundle, load_bundle
from ..policies.protocol import Measure
from ..run.generate import Job
from ..sampling.chunk import Chunk
from ..sampling.noise import flow_sigmas
from ..sampling.schedule import ChunkSchedule
from ..training.scenes import HELD_OUT, make_scene, motion_mask, render
from .measured import data, origin, table

NAME = "recall"
MEASURES: tuple[Measure, ...] = ("clean", "noisy", "output", "change")
SHARES = (0.2, 0.4, 0.6)
FRAMES = 57
ENOUGH, TOO_MUCH = 0.02, 0.6
"""Clips are taken in which the share of moving tokens lies between these two."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clips", type=int, default=8, help="how many held-out clips (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="steps of the schedule; every fifth of them, from a fifth on, is looked at")


@torch.inference_mode()
def run(args: argparse.Namespace) -> dict[str, Any]:
    """-> {"rows": per measure the recall at each share and the rank correlation, means over chunks, steps and clips}."""
    if args.clips < 1 or args.steps < 10:
        raise ValueError(f"{args.clips} clips and {args.steps} steps were asked for: use at least 1 clip and 10 steps")
    bundle = load_bundle()
    found: dict[str, list[list[float]]] = {measure: [] for measure in (*MEASURES, "chance")}
    moving_shares, seed = [], HELD_OUT + 5000
    with tqdm(total=args.clips, unit="clip") as bar:
        while bar.n < args.clips:
            scene, seed = make_scene(seed, FRAMES), seed + 1
            film = render(scene)
            moving = tokens_that_move(motion_mask(film))
            share = float(moving.float().mean())
            if not ENOUGH <= share <= TOO_MUCH:
                continue
            moving_shares.append(share)
            for measure, values in _clip(bundle, scene.caption, film, moving, args.steps, seed):
                found[measure].append(values)
            bar.update()
    rows = []
    for name, lines in found.items():
        mean = torch.tensor(lines).mean(0).tolist()
        recall = {f"recall@{share:.0%}": round(r, 3) for share, r in zip(SHARES, mean, strict=False)}
        rows.append({"measure": name, **recall, "spearman": round(mean[-1], 3)})
    return {
        "clips": args.clips,
        "steps": args.steps,
        "dtype": bundle.dtype,
        "moving_share": round(sum(moving_shares) / len(moving_shares), 3),
        "rows": rows,
    }


def tokens_that_move(cells: Tensor) -> Tensor:
    """Bool [F, h, w] of latent cells -> [F, h / 2, w / 2] of tokens: any of its cells changed."""
    return torch.nn.functional.max_pool2d(cells.float(), 2) > 0


def recall(ranking: Tensor, wanted: Tensor, share: float) -> float:
    """Two of the same shape: scores, and bool -> which part of the wanted is among the first `share` of the ranking."""
    count = round(share * ranking.numel())
    return float(wanted.flatten()[ranking.flatten().topk(count).indices].sum() / wanted.sum())


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two tensors with the same number of elements."""
    ranks = [t.flatten().argsort().argsort().double() for t in (a, b)]
    x, y = (r - r.mean() for r in ranks)
    return float((x * y).sum() / (x.norm() * y.norm()))


def _clip(bundle: Bundle, caption: str, film: Tensor, moving: Tensor, steps: int, seed: int) -> list[tuple[str, list[float]]]:
    """Every measure at every step looked at and every chunk in which something moves: its recalls, then its correlation."""
    clean = bundle.vae.encode(film.transpose(0, 1)[None] * 2 - 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    sigmas, schedule = flow_sigmas(steps, Job.shift), ChunkSchedule(clean.shape[2], bundle.layout.chunk_frames, steps)
    adapter = require_tokens(bundle.adapter(), "bench recall")
    text = adapter.text(bundle.text(caption))
    ends = [sum(schedule.span(k)) * moving[0].numel() for k in range(schedule.chunks)]

    def look(step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, velocity, last block's output on the grid of tokens."""
        x = (1 - sigmas[step]) * clean + sigmas[step] * noise
        call = Call(x, sigmas[step], Chunk(0, 0, x.shape[2], step, steps), text, 24)
        velocity, residual = adapter.forward(call, BlockCausal(ends, bundle.layout.window))
        return x, velocity, adapter.output(call, residual).unflatten(1, moving.shape).movedim(-1, 1)

    out: list[tuple[str, list[float]]] = []
    for step in range(max(steps // 5, 2), steps, 5):
        (_, v0, _), (x1, v1, h1), (x2, v2, _) = (look(s) for s in (step - 2, step - 1, step))
        truth = pooled((v2 - v1).abs().mean((0, 1)), (2, 2))
        maps = {
            "clean": pooled(frame_difference(x1 - sigmas[step - 1] * v1, None), (2, 2)),
            "noisy": pooled(frame_difference(x2, None), (2, 2)),
            "output": frame_difference(h1, None, relative=True),
            "change": pooled((v1 - v0).abs().mean((0, 1)), (2, 2)),
            "chance": torch.rand(moving.shape, generator=torch.Generator().manual_seed(seed + step)),
        }
        for k in range(schedule.chunks):
            start, count = schedule.span(k)
            here = slice(start, start + count)
            if not moving[here].any():
                continue
            for name, value in maps.items():
                ranking = normalised(value[here])
                out.append((name, [*(recall(ranking, moving[here], s) for s in SHARES), spearman(ranking, truth[here])]))
    return out


def shown() -> str:
    rows = data(NAME)["rows"]
    return table(list(rows[0]), [list(row.values()) for row in rows])


FIGURES: dict[str, Callable[[], str]] = {"recall": shown, "recall-origin": lambda: origin(NAME)}

"""Trains the small SkyReels-V2 network on procedural video, in the latents that the small VAE is taught too.

One set of weights has to be right for everything that sampling does, so every batch draws how it is run: block-causal
(with or without a limited window) or bidirectional, and which noise levels its chunks have: a row of the real
asynchronous schedule, all chunks alike, a clean or slightly noised prefix, or levels that rise from chunk to chunk. Some batches
begin with a single given frame, as image to video does, and their chunks are shifted by it. Some are a piece from the middle of a long film,
and in some the finished chunks are worn: not true clips, but what the network itself makes of them, as in a film that rolls on for a minute.
What a film shows, of which shape, and where is decided in its first chunk, so most batches are at first of first pictures alone and of first
chunks alone, of which many cost what a clip does; in the end most are of whole clips.
Loss: mean squared error of the velocity (noise - clean), on the chunks that a step would move. What moves fills a tenth
of the picture, so its cells count more, the more the earlier the training is; at the end every cell counts alike.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..models.attention import BlockCausal, bidirectional
from ..models.skyreels import SkyReelsConfig, SkyReelsV2
from ..models.wan_vae import TEMPORAL
from ..models.word_text import encode_prompt
from ..network import Attend
from ..sampling.noise import TRAIN_STEPS, flow_sigmas
from .basis import load_or_fit
from .clips import MOST_BEGUN, POOL, Beginning, Clips, beginning_at, moving, standing_out, velocity_loss
from .loop import USUAL, Loop, TrainOptions, export, optimisers, side_by_side, threads, training_device
from .scenes import Scene, make_scene

CONFIG = SkyReelsConfig(dim=256, ffn_dim=1024, layers=6, text_dim=256, fps=True)
FRAMES, LATENTS, CHUNK, SIZE = 57, 15, 3, 128
TOKENS_PER_FRAME = 64
STEPS, BATCH = 9000, 6
SHIFTS = 3.0, 5.0, 8.0, 8.0
"""Of the tables of noise levels that batches draw from; 8, of films, twice as likely as the others."""
EMPHASIS = 6.0
"""How much more a moving cell counts at step 0."""
CHUNKS = LATENTS // CHUNK
LATE, LATEST = 0.35, 1440
"""Share of the batches that are from the middle of a film, and the frame at which they begin at the latest."""
BEGINNINGS = Beginning(1, 8, (0.7, 0.1)), Beginning(CHUNK, CHUNKS, (0.25, 0.25))
"""First pictures, first chunks; all other batches are of whole clips."""
FINISHED = 0.06
"""Chunks that do not count and are less noisy than this are history."""
WORN = 0.3
"""Share of the block-causal batches in which history is worn."""
THREADS = 2
"""That compute a share of a batch each, where there is no GPU."""


def fps(index: int) -> int:
    """Of a clip: one in eight is drawn at 16 frames a second."""
    return 16 if index % 8 == 7 else 24


def scene(index: int) -> Scene:
    return make_scene(index, FRAMES, SIZE, fps(index))


def late_scene(index: int) -> Scene:
    """A piece from the middle of a film: its first latent frame covers four frames, like all others."""
    return replace(scene(index), frames=FRAMES + 3, late=4 * random.Random(index).randint(1, LATEST // 4) + 1)


def first_chunk(index: int) -> Scene:
    """Of a clip, up to the end of its first chunk."""
    return replace(scene(index), frames=TEMPORAL * (CHUNK - 1) + 1)


def draw_levels(rng: random.Random, begun: bool = False) -> tuple[list[float], list[bool]]:
    """-> noise level of every chunk (1 noise .. 0 clean), and whether the chunk counts in the loss: if it is begun and not finished.

    `begun`: the first chunk is finished."""
    steps = rng.randint(16, 60)
    table = (1.0 - 1 / TRAIN_STEPS, *flow_sigmas(steps, rng.choice(SHIFTS)))
    kind = rng.random()
    if kind < 0.45:
        lead, lag = rng.randint(1, steps + 12 * (CHUNKS - 1)), rng.randint(2, 12)
        index = [lead - k * lag for k in range(CHUNKS)]
    elif kind < 0.65:
        index = [rng.randint(1, steps)] * CHUNKS
    else:
        index = sorted((rng.randint(1, steps) for _ in range(CHUNKS)), reverse=True)
        for k in range(rng.choice([0, 1, 1, 2, 3, 4])):
            index[k] = steps + 1
    index = [min(max(i, 0), steps + 1) for i in index]
    levels = [table[i] for i in index]
    counts = [1 <= i <= steps for i in index]
    if rng.random() < 0.3:
        prefix = rng.uniform(0, 50) / TRAIN_STEPS
        levels = [level or prefix for level in levels]
    if not any(counts) or (begun and counts[0]):
        return draw_levels(rng, begun)
    return levels, counts


def picked(clips: Clips, step: int, count: int, rng: random.Random) -> tuple[Tensor, list[str], int]:
    """-> latents [B, 16, F, h, w], captions, frames per second, the same of all."""
    slow = rng.random() < 1 / 8
    indices = [8 * rng.randrange(clips.pool(step) // 8) + (7 if slow else rng.randrange(7)) for _ in range(count)]
    latents, captions = zip(*(clips[i] for i in indices), strict=True)
    return torch.stack(latents).float(), list(captions), fps(indices[0])


def texts_of(captions: Sequence[str], rng: random.Random, like: Tensor) -> Tensor:
    """[B, words, text_dim]; one in ten is of no words, for guidance."""
    return torch.cat([encode_prompt("" if rng.random() < 0.1 else caption, CONFIG.text_dim) for caption in captions]).to(like)


def beginning_loss_of(net: SkyReelsV2, clips: Clips, kind: Beginning, step: int, count: int, seed: int, emphasis: float) -> Tensor:
    """Of as many `clips` up to a first picture or chunk as cost what `count` whole ones do, each at its own noise level."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    clean, captions, rate = picked(clips, step, count * kind.times, rng)
    clean, text = clean[:, :, : kind.frames], texts_of(captions, rng, clean)
    tables = [flow_sigmas(rng.randint(16, 60), rng.choice(SHIFTS))[:-1] for _ in captions]
    sigma = torch.tensor([rng.choice(table) for table in tables])[:, None].expand(-1, kind.frames).to(clean)
    noise, s = torch.randn(clean.shape, generator=generator).to(clean), sigma[:, None, :, None, None]
    with torch.autocast(clean.device.type, torch.bfloat16, cache_enabled=False):
        velocity = net((1 - s) * clean + s * noise, (sigma * TRAIN_STEPS).floor(), net.text_kv(text), bidirectional, fps=rate)
    return velocity_loss(velocity, noise, clean, torch.ones_like(s), standing_out(clean), emphasis)


def loss_of(net: SkyReelsV2, usual: Clips, late: Clips, step: int, batch: int, seed: int, emphasis: float) -> Tensor:
    """Of `batch` clips that are run alike."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    middle = rng.random() < LATE
    clean, captions, rate = picked(late if middle else usual, step, batch, rng)
    text = texts_of(captions, rng, clean)
    drawn = [draw_levels(rng, begun=middle) for _ in range(batch)]
    spans = torch.full((CHUNKS,), CHUNK)
    if not middle and rng.random() < 0.15:
        drawn = [([rng.choice([0.0, 0.02]), *levels], [False, *counts]) for levels, counts in drawn]
        spans = torch.tensor([1, *[CHUNK] * (CHUNKS - 1), CHUNK - 1])
    sigma = torch.tensor([levels for levels, _ in drawn]).repeat_interleave(spans, 1).to(clean)
    counts = torch.tensor([c for _, c in drawn], dtype=torch.float32).repeat_interleave(spans, 1)[:, None, :, None, None].to(clean)
    noise = torch.randn(clean.shape, generator=generator).to(clean)

    ends = (spans.cumsum(0) * TOKENS_PER_FRAME).tolist()
    causal = middle or rng.random() < 0.62
    window = rng.choice([2, 3, 4]) if rng.random() < 0.3 else None
    attend: Attend = BlockCausal(ends, window) if causal else bidirectional

    def velocity(history: Tensor, level: Tensor) -> Tensor:
        s = level[:, None, :, None, None]
        noisy = (1 - s) * history + s * noise
        with torch.autocast(clean.device.type, torch.bfloat16, cache_enabled=False):
            out: Tensor = net(noisy, (level * TRAIN_STEPS).floor(), net.text_kv(text), attend, fps=rate)
        return out

    history = clean
    if causal and rng.random() < WORN:
        wear = torch.tensor([rng.uniform(0.15, 0.75) for _ in range(batch)]).to(clean)[:, None].expand_as(sigma)
        with torch.no_grad():
            guess = (1 - wear[:, None, :, None, None]) * clean + wear[:, None, :, None, None] * (noise - velocity(clean, wear).float())
        finished = ((counts == 0) & (sigma < FINISHED)[:, None, :, None, None]).to(clean)
        history = torch.lerp(clean, guess, finished)
    return velocity_loss(velocity(history, sigma), noise, clean, counts, moving(clean), emphasis)


def train(out: Path, steps: int, batch: int = BATCH, options: TrainOptions = USUAL) -> None:
    """Writes `dit.pt` (resumable) and `dit.safetensors` (averaged weights, bfloat16) into `out`."""
    basis, most, device = load_or_fit(out), options.clips or POOL, training_device()
    usual, late = (Clips(basis, drawn, LATENTS, most=most, device=device) for drawn in (scene, late_scene))
    begun = Clips(basis, first_chunk, CHUNK, most=max(most, MOST_BEGUN), device=device)
    torch.manual_seed(0)
    net = SkyReelsV2(CONFIG)
    net.initialise()
    if options.start:
        net.load_state_dict(load_file(options.start))
    net.to(device)
    parameters = list(net.parameters())
    shares = [batch] if device.type == "cuda" else [batch - batch // THREADS * (THREADS - 1), *[batch // THREADS] * (THREADS - 1)]
    with threads(THREADS) as pool:
        loop = Loop(net, out / "dit.pt", steps, optimisers(net, 1e-3, 1e-2, pool=pool), decay=0.998)

        def loss(step: int) -> Tensor:
            emphasis, beginning = EMPHASIS * (1 - step / steps), beginning_at(BEGINNINGS, step / steps, random.Random(f"kind {step}").random())
            one = partial(beginning_loss_of, net, begun, beginning) if beginning else partial(loss_of, net, usual, late)
            parts = [partial(one, step, share, THREADS * step + k, emphasis) for k, share in enumerate(shares) if share]
            return side_by_side(parts, parameters, pool)

        loop.run(loss, parameters, lambda: f"clips {sum(len(clips.captions) for clips in (usual, late, begun))}", options)
    export(out, "skyreels-v2-df", CHUNK, CHUNKS)

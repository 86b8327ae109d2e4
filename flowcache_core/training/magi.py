"""Trains the small MAGI-1 network on procedural video, in the latents that its small VAE is built for.

A batch is a list of chunks, each with its own noise level, text, position and range of history; chunks of one row of a film stand
next to each other in it. They are drawn as the published pipeline meets them: in flight together, each some steps behind the one before;
finished ones clean, without text and seeing themselves alone; the branches of guidance (text and history, history
alone, the chunk alone); a first chunk whose first frames are given. At first many batches are of first latent frames alone, in which
it is decided what a film shows.
Loss: as in `dit.py`, on the chunks in flight.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..kernels.attention import heads_apart, heads_together
from ..models.magi import KV, PATCH, LayerText, Magi, MagiConfig, rope_table
from ..models.magi_adapter import NULL_WORDS, RANGES
from ..models.magi_family import CHUNK_FRAMES, COMMIT, MAGI, STAGES
from ..models.word_text import encode_prompt
from .basis import load_or_fit
from .clips import MOST_BEGUN, POOL, Beginning, Clips, beginning_at, moving, standing_out, velocity_loss
from .loop import USUAL, Loop, TrainOptions, export, optimisers, side_by_side, threads, training_device
from .scenes import Scene, make_scene

CONFIG = MagiConfig(dim=256, ffn_dim=1024, layers=6, kv_heads=1, head_dim=128, text_dim=256, caption=64)
CHUNKS, SIZE = 5, 128
FRAMES = MAGI.frames.pixel(CHUNKS * CHUNK_FRAMES)
PACE = 40
"""Frames per second at which sprites are drawn up: on the way through a film of 96 frames they go as far as in 57 at 24."""
STEPS, BATCH = 4000, 12
"""`BATCH`: chunks of a batch, at least."""
SMALL, SMALL_SHARE, SMALL_BATCH = 64, 0.6, 4
"""In the first share of the steps every other batch has pictures of `SMALL` pixels a side, and `SMALL_BATCH` times as many chunks, which take less
time than those of a large batch. Places span the same range."""
ALONE, HISTORY = 0.1, 0.17
"""Shares of rows that are evaluated as the branches of guidance without text are: a chunk alone, and chunks with their history."""
FIRST_FRAMES = Beginning(1, 6, (0.6, 0.1))
EMPHASIS = 6.0
SLOWEST = 0.03
"""The lowest of the rotary bands, in radians per latent frame; the highest is 1."""
BASIS_CLIPS = 64
FRESH = {"layer_norm.weight": 1.0, "post_norm.weight": -0.7, "ada_modulate_layer.proj.0.bias": 1.0}
"""Endings of names of vectors that do not begin at 0. What post-norms multiply by is 1 more than their weight."""
OUTER = ("x_embedder", "final_linear")
WIDE = ("rope.bands",)
"""What keeps its 32 bits in the file."""
THREADS = 2


@dataclass(frozen=True, slots=True)
class Part:
    """A chunk in a batch. `chunk`: its number in the clip; `level`: its noise; `seen`: chunks of the batch that it sees, itself the last of them.

    `text`: None for the null caption; `dropped`: whether the dropped flag is set; `given`: how many first frames are given; `active`: not finished.
    """

    chunk: int
    level: float
    seen: int
    text: str | None = None
    dropped: bool = False
    given: int = 0
    active: bool = True


def scene(index: int, size: int = SIZE) -> Scene:
    return make_scene(index, FRAMES, size, PACE)


def beginning(index: int) -> Scene:
    """Of a clip, its first latent frames."""
    return replace(scene(index), frames=MAGI.frames.pixel(FIRST_FRAMES.frames))


def draw_beginning(rng: random.Random, caption: str) -> list[Part]:
    """The beginning of a film's first chunk, alone."""
    levels = MAGI.noise.levels(STAGES * rng.randint(4, 16), MAGI.noise.shift)
    dropped = rng.random() < ALONE
    return [Part(0, rng.choice(levels[:-1]), 1, None if dropped else caption, dropped)]


def draw_row(rng: random.Random, caption: str) -> list[Part]:
    """The chunks of one film that one evaluation of one branch of guidance takes in, finished ones first."""
    steps = STAGES * rng.randint(4, 16)
    levels = MAGI.noise.levels(steps, MAGI.noise.shift)
    if (branch := rng.random()) < ALONE:
        chunk = rng.randrange(CHUNKS)
        return [Part(chunk, levels[rng.randrange(steps * (STAGES - 1) // STAGES)], 1, None, True, _draw_given(rng, 0.1) if chunk == 0 else 0)]
    text, dropped = (None, True) if branch < ALONE + HISTORY else ("" if rng.random() < 0.03 else caption, False)
    at, before, starts = _draw_active(rng, steps)
    seen = [RANGES[step * STAGES // steps] for step in at]
    before = max(0, min(before, max(count - 1 - place for place, count in enumerate(seen))))
    first = 0 if starts and not before else rng.randint(0, CHUNKS - before - len(at))
    finished = [Part(first + k, COMMIT, 1, None, True, active=False) for k in range(before)]
    active = [
        Part(first + before + place, levels[step], min(count, before + place + 1), text, dropped)
        for place, (step, count) in enumerate(zip(at, seen, strict=True))
    ]
    if starts:
        active[0] = replace(active[0], given=_draw_given(rng, 0.4 if before else 0.12))
    return finished + active


def _draw_active(rng: random.Random, steps: int) -> tuple[list[int], int, bool]:
    """-> the steps at which the chunks in flight are, the oldest first; how many are finished; whether the oldest is the first that is generated."""
    together = rng.choice([k for k in (4, 4, 4, 4, 4, 4, 2, 3, 1) if steps % k == 0])
    lag = steps // together
    starts = rng.random() < 0.45
    lead = rng.randrange(steps) if starts else rng.randrange(steps - lag, steps)
    at = [lead - k * lag for k in range(together) if lead >= k * lag]
    before = rng.randint(1, CHUNKS - len(at)) if not starts or rng.random() < 0.15 else 0
    return at, before, starts


def _draw_given(rng: random.Random, share: float) -> int:
    """Given first frames of a chunk: often a single one."""
    return rng.choice([1, 1, 2, 3, 4, 5]) if rng.random() < share else 0


Rows = list[tuple[int, list[Part]]]
"""Of films: index of the clip, chunks."""
DrawRow = Callable[[random.Random, str], list[Part]]


def draw_batch(rng: random.Random, captions: Iterator[tuple[int, str]], chunks: int, draw: DrawRow = draw_row) -> Rows:
    """Rows of as many clips as make at least `chunks` chunks."""
    rows: Rows = []
    while sum(len(row) for _, row in rows) < chunks:
        index, caption = next(captions)
        rows.append((index, draw(rng, caption)))
    return rows


def halves(rows: Rows) -> tuple[Rows, Rows]:
    """The rows in two shares of nearly as many chunks."""
    shares: tuple[Rows, Rows] = [], []
    for row in sorted(rows, key=lambda row: -len(row[1])):
        min(shares, key=lambda share: sum(len(parts) for _, parts in share)).append(row)
    return shares


class ChunkAttention:
    """The attention that a network calls: chunk i of the batch attends to the `seen[i]` chunks that end with itself."""

    def __init__(self, seen: Sequence[int]) -> None:
        self.seen = tuple(seen)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        device = q.device.type
        if torch.is_autocast_enabled(device):
            q, k, v = (each.to(torch.get_autocast_dtype(device)) for each in (q, k, v))
        out: Tensor = RangedAttention.apply(q, k, v, self.seen)  # type: ignore[no-untyped-call]
        return out


class RangedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(D)) v over neighbouring chunks, [B, G * heads, T, D], [B, heads, T, D] twice -> [B, G * heads, T, D].

    Chunk i of the batch sees chunks i - seen[i] + 1 .. i. Its keys are read where they lie: the product form gathers a copy for every chunk
    that sees them, and a gradient of the size of all keys with it.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: tuple[int, ...]) -> Tensor:
        heads, scale = k.shape[1], q.shape[-1] ** -0.5
        together, weights, out = heads_together(q, heads) * scale, [], []
        with torch.autocast(q.device.type, enabled=False):
            for i, count in enumerate(seen):
                weights.append((together[i] @ _side_by_side(k, i, count).mT).softmax(-1))
                out.append(weights[-1] @ _side_by_side(v, i, count))
        ctx.seen, ctx.scale, ctx.queries = seen, scale, q.shape[1]
        ctx.save_for_backward(together, k, v, *weights)
        return heads_apart(torch.stack(out), q.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        together, k, v, *weights = ctx.saved_tensors
        grad = heads_together(grad.to(k), k.shape[1])
        to_k, to_v = (torch.zeros_like(k, dtype=torch.promote_types(k.dtype, torch.float32)) for _ in range(2))
        to_q = []
        for i, (count, p) in enumerate(zip(ctx.seen, weights, strict=True)):
            of = slice(i - count + 1, i + 1)
            to_v[of] += _split(p.mT @ grad[i], count)
            to_p = grad[i] @ _side_by_side(v, i, count).mT
            to_s = torch._softmax_backward_data(to_p, p, -1, p.dtype)
            to_q.append(to_s @ _side_by_side(k, i, count) * ctx.scale)
            to_k[of] += _split(to_s.mT @ together[i], count)
        return heads_apart(torch.stack(to_q), ctx.queries), to_k.to(k), to_v.to(v), None


def _side_by_side(x: Tensor, last: int, count: int) -> Tensor:
    """Of [B, heads, T, D] the `count` chunks up to `last`, one behind the other: [heads, count * T, D]."""
    return x[last - count + 1 : last + 1].transpose(0, 1).flatten(1, 2)


def _split(x: Tensor, count: int) -> Tensor:
    """Inverse of `_side_by_side`: [heads, count * T, D] -> [count, heads, T, D]."""
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def run(net: Magi, x: Tensor, parts: Sequence[Part], texts: dict[str, Tensor]) -> Tensor:
    """Latents [B, 16, 6, h, w] of the chunks `parts` -> velocities, the same shape. texts: [1, words, text_dim] of every prompt in `parts`."""
    tokens, grid = net.embed(x), (x.shape[2], x.shape[3] // PATCH, x.shape[4] // PATCH)
    times = torch.tensor([[1 - part.level] for part in parts], dtype=torch.float64, device=x.device)
    condition = net.t_embedder(times, tokens.dtype)
    condition = condition + net.y_embedder.dropped_flags([part.dropped for part in parts], condition)
    rope = torch.stack([rope_table(net.rope.bands, part.chunk * CHUNK_FRAMES, *grid, x.device) for part in parts]).unsqueeze(1)
    out = net.stack(tokens, condition, _texts(net, parts, texts), rope, ChunkAttention([part.seen for part in parts]))
    return net.velocity(out, grid)


def _texts(net: Magi, parts: Sequence[Part], texts: dict[str, Tensor]) -> list[LayerText]:
    """Keys and values of every chunk's text; each text goes through the network once, all of them side by side."""
    known: dict[str | None, Tensor] = {None: net.null_text(NULL_WORDS)}
    known.update(texts)
    which, longest = {text: place for place, text in enumerate(known)}, max(text.shape[1] for text in known.values())
    side_by_side = torch.cat([nn.functional.pad(text, (0, 0, 0, longest - text.shape[1])) for text in known.values()])
    layers = net.text_kv(side_by_side)

    def of(text: str | None) -> LayerText:
        place, words = which[text], known[text].shape[1]

        def layer(number: int) -> KV:
            k, v = layers[number]
            return k[place : place + 1, :, :words], v[place : place + 1, :, :words]

        return layer

    made = {text: of(text) for text in known}
    return [made[part.text] for part in parts]


@cache
def words_of(caption: str) -> Tensor:
    """The text [1, 32, text_dim] of a caption."""
    return encode_prompt(caption, CONFIG.text_dim)


def without_padding(text: Tensor) -> Tensor:
    """Rows of zeros at the end are cut off, all but one."""
    rows = int(text[0].abs().amax(1).count_nonzero())
    return text[:, : max(rows, 1)]


def batch_of(clips: Clips, step: int, chunks: int, draw: DrawRow = draw_row) -> Rows:
    rng = random.Random(step)

    def picked() -> Iterator[tuple[int, str]]:
        while True:
            index = rng.randrange(clips.pool(step))
            yield index, clips[index][1]

    return draw_batch(rng, picked(), chunks, draw)


def loss_of(net: Magi, clips: Clips, rows: Rows, seed: int, emphasis: float, begun: bool = False) -> Tensor:
    """`begun`: whether the clips are beginnings."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    parts = [part for _, row in rows for part in row]
    texts = {part.text: words_of(part.text) for part in parts if part.text is not None}
    texts = {text: without_padding(rows) if rng.random() < 0.5 else rows for text, rows in texts.items()}
    clean, moves = _drawn(clips, rows, standing_out if begun else moving)
    noise, like = torch.randn(clean.shape, generator=generator).to(clean), next(net.parameters())
    level = torch.tensor([part.level if part.active else rng.choice([0.0, rng.uniform(0, 0.1)]) for part in parts]).view(-1, 1, 1, 1, 1).to(clean)
    given = torch.tensor([[frame < part.given for frame in range(clean.shape[2])] for part in parts]).view(len(parts), 1, -1, 1, 1).to(clean.device)
    noisy = torch.where(given, clean, (1 - level) * clean + level * noise)
    counts = torch.tensor([part.active for part in parts], device=clean.device).view(-1, 1, 1, 1, 1) & ~given
    with torch.autocast(like.device.type, torch.bfloat16, cache_enabled=False):
        velocity = run(net, noisy.to(like), parts, {text: rows.to(like) for text, rows in texts.items()})
    noise, clean, weight, moves = (each.to(like) for each in (noise, clean, counts, moves))
    return velocity_loss(velocity, noise, clean, weight, moves, emphasis)


def _drawn(clips: Clips, rows: Iterable[tuple[int, list[Part]]], cells: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Clean latents [B, 16, 6, h, w] of the chunks of all rows, and which `cells` of them count more [B, 1, 6, h, w]. A single given frame
    stands still."""
    clean, moves = [], []
    for index, row in rows:
        latents = clips[index][0][None].float()
        more = cells(latents)
        for part in row:
            of = slice(part.chunk * CHUNK_FRAMES, (part.chunk + 1) * CHUNK_FRAMES)
            mine = latents[:, :, of]
            if part.given == 1 and part.chunk == 0:
                mine = torch.cat([clips.still(index)[None], mine[:, :, 1:]], 2)
            clean.append(mine)
            moves.append(more[:, :, of])
    return torch.cat(clean), torch.cat(moves)


@torch.no_grad()
def initialise(net: Magi) -> None:
    """Fresh weights: Xavier matrices, zero output; layers begin as small changes of what they are given, with open gates."""
    for name, p in net.named_parameters():
        if p.ndim > 1:
            nn.init.xavier_uniform_(p.flatten(1))
        else:
            nn.init.constant_(p, next((value for ending, value in FRESH.items() if name.endswith(ending)), 0.0))
    caption: Tensor = net.y_embedder.null_caption_embedding
    nn.init.normal_(caption)
    nn.init.normal_(net.y_embedder.get_parameter("y_proj_xattn.0.weight"), std=net.config.text_dim**-0.5)
    nn.init.zeros_(net.final_linear.linear.weight)
    net.rope.bands.copy_(SLOWEST ** (torch.arange(net.config.bands) / (net.config.bands - 1)))
    net.rope.bands.requires_grad_(False)


def train(out: Path, steps: int, batch: int = BATCH, options: TrainOptions = USUAL) -> None:
    """Writes `dit.pt` (resumable) and `dit.safetensors` (averaged weights, bfloat16) into `out`."""
    basis, most = load_or_fit(out, BASIS_CLIPS, scene), options.clips or POOL
    small, large = (Clips(basis, partial(scene, size=size), CHUNKS * CHUNK_FRAMES, 2, most, training_device()) for size in (SMALL, SIZE))
    begun = Clips(basis, beginning, FIRST_FRAMES.frames, 2, max(most, MOST_BEGUN), training_device())
    torch.manual_seed(0)
    net = Magi(CONFIG)
    initialise(net)
    if options.start:
        net.load_state_dict(load_file(options.start))
    net.to(training_device())
    parameters = [p for p in net.parameters() if p.requires_grad]
    with threads(THREADS) as pool:
        loop = Loop(net, out / "dit.pt", steps, optimisers(net, 1e-3, 1e-2, OUTER, pool), decay=0.998)

        def loss(step: int) -> Tensor:
            clips, chunks, draw = (small, SMALL_BATCH * batch, draw_row) if step < SMALL_SHARE * steps and step % 2 else (large, batch, draw_row)
            if kind := beginning_at([FIRST_FRAMES], step / steps, random.Random(f"kind {step}").random()):
                clips, chunks, draw = begun, kind.times * batch, draw_beginning
            emphasis = EMPHASIS * (1 - step / steps)
            shares = [share for share in halves(batch_of(clips, step, chunks, draw)) if share]
            losses = [partial(loss_of, net, clips, share, 2 * step + k, emphasis, bool(kind)) for k, share in enumerate(shares)]
            return side_by_side(losses, parameters, pool)

        loop.run(loss, parameters, lambda: f"clips {sum(len(clips.captions) for clips in (small, large, begun))}", options)
    export(out, MAGI.name, CHUNK_FRAMES, CHUNKS, WIDE)

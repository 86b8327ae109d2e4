"""Distils tiny-causal from tiny-skyreels: four steps a chunk, without guidance.

The student is the teacher without the frame rate, which is one number for all its films and becomes a part of a bias. It learns by
regression where the guided teacher ends (`trajectories.py`): first from states of the teacher's own films, then, round after round,
from states of its own films on its own clean chunks (as in Self-Forcing, arXiv 2506.08009, history is what the student made, and gets
no gradient; the target is the teacher's, not a distribution). Some of these films are the end of longer ones.
Loss: as in `dit.py`, of the velocity that leads from a state to its target; cells that move count more.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ..device import fast_dtype
from ..models.bundle import load_bundle
from ..models.causal_wan_checkpoint import HOST_CONFIG, HOST_KEY
from ..models.causal_wan_family import SELF_FORCING
from ..models.skyreels import FPS as RATES
from ..models.skyreels import SkyReelsV2
from . import dit
from .clips import moving
from .loop import USUAL, Loop, TrainOptions, export, optimisers, side_by_side, threads
from .scenes import make_scene
from .trajectories import CHUNK, FILMS, FPS, LEVELS, Branch, Piece, corrected, load, own_films, save, text_of

CONFIG = replace(dit.CONFIG, fps=False)
CHUNKS, SIDE = dit.CHUNKS, dit.SIZE // 8
STEPS, BATCH = 480, 8
ROUND = 48
"""Steps on one more set of trajectories; the first is the teacher's."""
PIECES = 6
"""Of a round."""
STARTS = (3, 2, 3, 1, 2, 0)
"""From which of the student's levels on the teacher corrects it, by piece of a round: the last steps make the picture, and cost least."""
ROLLED = (0, 0, 10, 10, 10, 0)
"""Chunks that the student made before those of the films, by piece of a round: history as films show it that have rolled on for long."""
NEWEST = 0.5
"""Share of films that are drawn from the newest round."""
EMPHASIS = 2.0
SAVE_EVERY = 20
FIRST_SEED = 5_000_000
THREADS = 2
AVERAGE = 0.98


def folded(teacher: SkyReelsV2, fps: int = FPS) -> dict[str, Tensor]:
    """Weights of the same network without frame rate, which computes what the teacher does at `fps`. float32."""
    weights = {name: value.float().clone() for name, value in teacher.state_dict().items() if not name.startswith("fps_")}
    with torch.no_grad():
        rate = deepcopy(teacher).float()
        weights["time_projection.1.bias"] += rate.fps_projection(rate.fps_embedding.weight[RATES.index(fps)])
    return weights


def working_copy(weights: Mapping[str, Tensor]) -> SkyReelsV2:
    """A student in the machine's fast dtype."""
    network = SkyReelsV2(CONFIG)
    network.load_state_dict(weights)
    return network.to(fast_dtype())


def captions_of(round_number: int, piece: int) -> tuple[str, ...]:
    first = FIRST_SEED + (round_number * PIECES + piece) * FILMS
    return tuple(make_scene(seed, dit.FRAMES, dit.SIZE, FPS).caption for seed in range(first, first + FILMS))


def noise_of(round_number: int, piece: int, draws: int = 1, chunks: int = CHUNKS) -> Tensor:
    """[draws, films, C, F, h, w]."""
    generator = torch.Generator().manual_seed(FIRST_SEED + round_number * PIECES + piece)
    return torch.randn(draws, FILMS, CONFIG.channels, chunks * CHUNK, SIDE, SIDE, generator=generator)


@torch.no_grad()
def rollout(student: SkyReelsV2, captions: Sequence[str], noise: Tensor) -> tuple[Tensor, Tensor]:
    """Films of the student, chunk by chunk, with re-noising between its steps. noise: [levels, films, C, F, h, w], of every step.

    -> its states at `LEVELS` [levels, films, C, F, h, w], its films [films, C, F, h, w].
    """
    text = text_of(captions, CONFIG.text_dim).to(next(student.parameters()))
    branch, states, films = Branch(student, student.text_kv(text), CHUNKS), [], []
    for first, fresh in enumerate(noise.split(CHUNK, 3)):
        clean, met = torch.zeros_like(fresh[0]), []
        for level, added in zip(LEVELS, fresh, strict=True):
            x = (1 - level) * clean + level * added
            clean = x - level * branch.velocity(x, level, first)
            met.append(x)
        branch.commit(clean, first)
        states.append(torch.stack(met))
        films.append(clean)
    return torch.cat(states, 3), torch.cat(films, 2)


def teacher_piece(teacher: SkyReelsV2, piece: int, captions: Sequence[str]) -> Piece:
    return own_films(teacher, captions, noise_of(0, piece)[0])


def student_piece(teacher: SkyReelsV2, student: SkyReelsV2, round_number: int, piece: int, captions: Sequence[str]) -> Piece:
    """Its last chunks, as a film of their own."""
    noise = noise_of(round_number, piece, len(LEVELS), CHUNKS + ROLLED[piece % len(ROLLED)])
    states, films = (made[..., -CHUNKS * CHUNK :, :, :] for made in rollout(student, captions, noise))
    first = STARTS[piece % len(STARTS)]
    return corrected(teacher, captions, states[first], films, first)


@dataclass(frozen=True)
class Example:
    """A film in a batch: states [C, F, h, w], every chunk at a level of its own; `sigma`: of every latent frame [F]."""

    caption: str
    state: Tensor
    sigma: Tensor
    clean: Tensor
    history: Tensor


def drawn(piece: Piece, rng: random.Random) -> Example:
    """A film of a piece. Of a student's films half of the chunks are at the level where the teacher set out, which the student met itself."""
    film, count = rng.randrange(len(piece.captions)), piece.states.shape[1]
    picked = [0 if piece.first and rng.random() < 0.5 else rng.randrange(count) for _ in range(piece.clean.shape[2] // CHUNK)]
    chunks = [piece.states[film, level, :, k * CHUNK : (k + 1) * CHUNK] for k, level in enumerate(picked)]
    sigma = torch.tensor([LEVELS[piece.first + level] for level in picked]).repeat_interleave(CHUNK)
    return Example(piece.captions[film], torch.cat(chunks, 1).float(), sigma, piece.clean[film].float(), piece.history[film].float())


def batch_of(pieces: Callable[[int, int], Piece], step: int, batch: int) -> list[Example]:
    """`pieces`: (round, number in it) -> trajectories. Films of the round of this step, and of all rounds up to it."""
    rng, newest = random.Random(step), step // ROUND
    rounds = [newest if rng.random() < NEWEST else rng.randint(0, newest) for _ in range(batch)]
    return [drawn(pieces(number, rng.randrange(PIECES)), rng) for number in rounds]


def regression(net: SkyReelsV2, examples: Sequence[Example], emphasis: float) -> Tensor:
    """Mean square error of the velocities of `net` against those that lead to the targets."""
    text = text_of([one.caption for one in examples], CONFIG.text_dim).to(next(net.parameters()))
    state, sigma, clean, history = (torch.stack([getattr(one, name) for one in examples]) for name in ("state", "sigma", "clean", "history"))
    with torch.no_grad():
        before = Branch(net, net.text_kv(text), CHUNKS)
        before.commit_film(history)
    velocity = Branch(net, net.text_kv(text), CHUNKS, before.history).velocity(state, sigma, 0)
    wanted = (state - clean) / sigma[:, None, :, None, None]
    weight = 1 + emphasis * moving(clean)
    return ((velocity - wanted).square() * weight).sum() / (weight.sum() * clean.shape[1])


class Rounds:
    """Trajectories in files, by round and number in it. What is there is not made again."""

    def __init__(self, out: Path, teacher: SkyReelsV2) -> None:
        self.out, self.teacher, self.known = out, teacher, dict[tuple[int, int], Piece]()

    def __call__(self, number: int, place: int) -> Piece:
        if (number, place) not in self.known:
            self.known[number, place] = load(self._file(number, place), captions_of(number, place))
        return self.known[number, place]

    def make(self, number: int, student: SkyReelsV2, pool: Executor) -> None:
        """Those of a round: the first of the teacher's films, the others of the student's."""

        def one(place: int) -> None:
            captions = captions_of(number, place)
            made = student_piece(self.teacher, student, number, place, captions) if number else teacher_piece(self.teacher, place, captions)
            save(made, self._file(number, place))

        missing = [place for place in range(PIECES) if not self._file(number, place).exists()]
        for _ in tqdm(pool.map(one, missing), f"round {number}", len(missing), unit="piece"):
            pass

    def _file(self, number: int, place: int) -> Path:
        return self.out / f"round-{number}" / f"{place}.safetensors"


def train(out: Path, steps: int, batch: int = BATCH, options: TrainOptions = USUAL) -> None:
    """Writes trajectories, `dit.pt` (resumable) and `dit.safetensors` (averaged weights, bfloat16) into `out`. No step at all makes the teacher's
    films alone. Its clips are films of its own: how many there are follows from the steps."""
    teacher, net = load_bundle(fast_dtype()).network, SkyReelsV2(CONFIG)
    net.load_state_dict(load_file(options.start) if options.start else folded(teacher))
    parameters, rounds = list(net.parameters()), Rounds(out, teacher)
    end = options.end(steps)
    with threads(THREADS) as pool:
        loop = Loop(net, out / "dit.pt", steps, optimisers(net, 5e-4, 5e-3, pool=pool), AVERAGE, SAVE_EVERY)

        def loss(step: int) -> Tensor:
            examples, copy = batch_of(rounds, step, batch), working_copy(net.state_dict())
            shares = [share for share in (examples[::2], examples[1::2]) if share]
            losses = [partial(regression, copy, share, EMPHASIS * (1 - step / steps)) for share in shares]
            found = side_by_side(losses, list(copy.parameters()), pool)
            for mine, worked in zip(parameters, copy.parameters(), strict=True):
                mine.grad = None if worked.grad is None else worked.grad.float()
            return found

        for number in range(-(-max(end, 1) // ROUND)):
            if options.over:
                break
            if loop.step <= number * ROUND:
                rounds.make(number, working_copy(loop.average), pool)
            loop.run(loss, parameters, options=replace(options, until=min(end, (number + 1) * ROUND)))
        loop.save()
    export(out, SELF_FORCING.name, CHUNK, CHUNKS, **{HOST_CONFIG: json.dumps({"transformer": {HOST_KEY: True}})})

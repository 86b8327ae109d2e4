"""The clips that a salience head learns from: where their latents come from, and what is measured on each and kept on disk.

Half the bundled model's clips are drawn and encoded, the other half it makes itself: in use the head sees the model's own
films. A checkpoint of which nothing but weights is at hand makes all of its clips itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..files import whole
from ..kv.scores.salience import places
from ..models.adapter import Call
from ..models.bundle import Bundle
from ..models.shards import read
from ..run.generate import Job, generate
from ..sampling.chunk import Chunk
from .salience_targets import Student, Teacher, counted
from .scenes import HELD_OUT, make_scene, render

LEVELS = (0.1, 0.3, 0.5)
"""Noise levels at which the teacher looks at a clip; what a token receives is the mean over them."""
UNPROMPTED = (3, 6)
"""Of eight clips, those that are measured without their prompt, as the unconditional branch of guidance runs."""


@dataclass(frozen=True, eq=False)
class Clip:
    """What is kept of a clip, for T of its tokens, all layers alike."""

    hidden: Tensor
    """[L, T, C]: what the self-attention of each layer is given in the clean pass."""
    received: Tensor
    """float32 [L, T, 3]: attention received by the teacher's tokens, in the order of OUT."""
    counted: Tensor
    """bool [T, 3]: where there was a query to pay attention."""
    chunk: Tensor
    """int64 [T]: in which chunk the token lies."""
    place: Tensor
    """float32 [T, 3 WAVES]: where in its chunk."""

    def save(self, path: Path) -> None:
        with whole(path) as partial:
            save_file({name: getattr(self, name).contiguous() for name in self.__dataclass_fields__}, partial)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Clip:
        return cls(**load_file(path, device=str(device)))


@torch.no_grad()
def measure(model: Bundle, latents: Tensor, text: Tensor, fps: int, seed: int, keep: int, taught_by: Bundle | None = None) -> Clip:
    """Latents [1, C, F, h, w] and text embeddings [1, L, text_dim] -> what is learnt from them, of at most `keep` tokens drawn by `seed`.

    The student's pass is the one that makes a chunk history: clean and block-causal. The teacher is the same network, or the one that
    it was distilled from (`taught_by`, of the same layers, latents and text), bidirectional, on the clip with noise.
    """
    adapter, x = model.adapter(), latents.to(model.like)
    grid = adapter.token_grid(x.shape[3], x.shape[4])
    tokens, chunk = x.shape[2] * grid[0] * grid[1], model.layout.chunk_frames * grid[0] * grid[1]
    whole, kv = Chunk(0, 0, x.shape[2], 0, 1), adapter.text(text.to(model.like))

    student = Student([*range(chunk, tokens, chunk), tokens])
    adapter.forward(Call(x, 0.0, whole, kv, fps), student)

    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(latents.shape, generator=rng).to(x)
    kept = torch.randperm(tokens, generator=rng)[:keep].sort().values
    sums: Tensor | None = None
    above = (taught_by or model).adapter()
    read = above.text(text.to((taught_by or model).like))
    for level in LEVELS:
        teacher = Teacher(chunk)
        above.forward(Call((1 - level) * x + level * noise, level, whole, read, fps), teacher)
        now = _stacked(teacher.received)
        sums = now if sums is None else sums + now
    assert sums is not None
    attention = (sums / len(LEVELS)).transpose(1, 2).cpu()
    counts, starts = counted(tokens, chunk).T[kept], kept // chunk * chunk
    frames = (tokens - starts).clamp(max=chunk) // (grid[0] * grid[1])
    return Clip(_stacked(student.hidden).cpu()[:, kept], attention[:, kept], counts, kept // chunk, places(kept - starts, frames, grid))


def _stacked(by_layer: Mapping[int, Tensor]) -> Tensor:
    return torch.stack([by_layer[layer][0] for layer in range(len(by_layer))])


class Source(Protocol):
    """Latents [1, C, F, h, w] of clip `index`, and its prompt."""

    def __call__(self, index: int, held_out: bool) -> tuple[Tensor, str]: ...


@dataclass(frozen=True)
class Sampled:
    """Films that the model makes of `prompts`, of which the last eighth are held out. Raises ValueError for a single prompt."""

    model: Bundle
    prompts: Sequence[str]
    job: Job

    def __post_init__(self) -> None:
        if len(self.prompts) < 2:
            raise ValueError(f"{len(self.prompts)} prompts are too few: at least one to train on and one to be held out are needed, one a line")

    def __call__(self, index: int, held_out: bool) -> tuple[Tensor, str]:
        kept = max(1, len(self.prompts) // 8)
        prompts = self.prompts[-kept:] if held_out else self.prompts[:-kept]
        job = replace(self.job, prompt=prompts[index % len(prompts)], seed=index + HELD_OUT * held_out)
        return generate(self.model, job)[0], job.prompt


@dataclass(frozen=True)
class Drawn:
    """Procedural video through the model's VAE, and its captions."""

    model: Bundle
    job: Job

    def __call__(self, index: int, held_out: bool) -> tuple[Tensor, str]:
        scene = make_scene(index + HELD_OUT * held_out, self.job.frames, self.job.size, self.job.fps)
        weight = next(self.model.vae.parameters())
        film = (render(scene).transpose(0, 1)[None] * 2 - 1).to(weight).contiguous(memory_format=torch.channels_last_3d)
        with torch.no_grad(), torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.dtype == torch.bfloat16):
            return self.model.vae.encode(film).float(), scene.caption


@dataclass(frozen=True)
class Half:
    """Every other clip from either source."""

    even: Source
    odd: Source

    def __call__(self, index: int, held_out: bool) -> tuple[Tensor, str]:
        return (self.odd if index % 2 else self.even)(index // 2, held_out)


@dataclass(frozen=True)
class WithEmbeddings(Bundle):
    """A model whose text embeddings were computed beforehand, by prompt; "" is the empty one."""

    embeddings: Mapping[str, Tensor] = field(default_factory=dict)

    def text(self, prompt: str) -> Tensor:
        return self.embeddings[prompt][None].to(self.like)


def read_embeddings(path: Path, prompts: Sequence[str], width: int) -> dict[str, Tensor]:
    """A safetensors file with a tensor [tokens, width] under every prompt and under "". Raises ValueError for anything less."""
    found = read(path)[0]
    if missing := [p for p in ("", *prompts) if p not in found]:
        raise ValueError(
            f"{path.name} lacks the embeddings of {len(missing)} of {len(prompts) + 1} prompts (the first: {missing[0]!r}): it needs a tensor "
            f"[tokens, {width}] under every line of the prompts file, and one under the empty key"
        )
    for prompt in ("", *prompts):
        shape = tuple(found[prompt].shape)
        if len(shape) != 2 or shape[1] != width:
            raise ValueError(f"{path.name}: the embedding of {prompt!r} has shape {shape}, but the model reads [tokens, {width}]")
    return found


def check_job(job: Job, model: Bundle) -> None:
    """Raises ValueError, before anything runs, for films that cannot be made or in which no chunk has a later one."""
    job.schedule(model)
    pixels, least = model.family.frames, model.layout.chunk_frames + 1
    frames = pixels.latent(job.frames)
    if frames < least:
        raise ValueError(
            f"clips of {job.frames} frames are one chunk of at most {model.layout.chunk_frames} latent frames, so no token has later ones: "
            f"use at least {pixels.pixel(least)} frames"
        )
    if frames > model.layout.chunk_frames * model.layout.window:
        longest = pixels.pixel(model.layout.chunk_frames * model.layout.window)
        raise ValueError(f"clips of {job.frames} frames are longer than the {longest} that the model can look at together: use at most {longest}")


class ClipStore:
    """The measured clips of one training, each a file in `folder`: `train` to learn from, `held_out` to be judged by."""

    def __init__(self, folder: Path, train: int, held_out: int) -> None:
        self.folder = folder
        self.train = [folder / f"train-{i:05d}.safetensors" for i in range(train)]
        self.held_out = [folder / f"held-out-{i:05d}.safetensors" for i in range(held_out)]

    def fill(self, model: Bundle, source: Source, fps: int, keep: int, taught_by: Bundle | None = None) -> None:
        """Makes the clips that are not there yet. `taught_by`: as in `measure`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        todo = [(i, kind is self.held_out, path) for kind in (self.train, self.held_out) for i, path in enumerate(kind)]
        there = sum(path.exists() for *_, path in todo)
        with tqdm(total=len(todo), initial=there, desc="clips", unit="clip", mininterval=1) as bar:
            for index, held_out, path in todo:
                if path.exists():
                    continue
                latents, prompt = source(index, held_out)
                text = model.text("" if index % 8 in UNPROMPTED else prompt)
                measure(model, latents, text, fps, index + HELD_OUT * held_out, keep, taught_by).save(path)
                bar.update()

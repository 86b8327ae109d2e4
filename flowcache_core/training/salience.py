"""`python -m flowcache_core.training.salience`: trains the salience head of a model, for the KV policy of that name.

The model itself is the teacher: the same weights, bidirectional, see which tokens later chunks look at; the head learns to
predict it from what the causal model knows when a chunk becomes history. First clips are made and measured, then the head
is trained on them, then it is judged by clips that were held out. A run that was stopped goes on from its work folder.
PaFu-KV, arXiv 2601.21896; what the paper leaves open is listed in docs/kv.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..device import fast_dtype
from ..files import refused, write_text
from ..kv.scores.salience import (
    BUNDLED,
    BUNDLED_FOR,
    COMMAND,
    FIXED,
    LOW,
    NARROWING,
    OUT,
    HeadInfo,
    Salience,
    SalienceHead,
    head_at,
    log_attention,
)
from ..models import bundle
from ..models.adapter import Bidirectional
from ..models.bundle import Bundle
from ..models.causal_wan_family import SELF_FORCING
from ..models.checkpoint import load_network_file, recognise
from ..models.shards import open_checkpoint
from ..models.skyreels_family import SKYREELS
from ..run.generate import Job
from ..untrusted import json_file, lines_of
from .dit import FRAMES, SIZE
from .loop import Loop
from .salience_clips import LEVELS, Clip, ClipStore, Drawn, Half, Sampled, Source, WithEmbeddings, check_job, read_embeddings
from .scenes import make_scene

CLIPS, STEPS, BATCH = 48, 1500, 4
PROMPTS = 256
"""Captions that the bundled model's own films are made of."""
HELD_OUT_SHARE = 6
"""One clip is held out for so many to learn from."""
RATE, DECAY = 1e-3, 0.99
RANKING, PAIRS, GAP = 0.5, 2048, 0.1
"""Weight of the ranking loss, pairs drawn per step, and how far apart in the order of the targets the two of a pair are at least."""
UMT5_WIDTH = 4096
SAMPLE_STEPS = 20
OURS = {"bundled": SKYREELS, **{name: family for name, family in bundle.BUNDLED.items() if family in (SKYREELS, SELF_FORCING)}}
"""Bundled models by name; the first is also called bundled."""
TAUGHT_BY = {"tiny-causal": SKYREELS}
"""Models that only look back: the bundled model that they were distilled from attends bidirectionally in their place."""


def ranks(x: Tensor, counted: Tensor) -> Tensor:
    """Place of every counted entry among those along dim 1, 0 for the least .. 1 for the greatest. Others get 1 and more."""
    order = x.masked_fill(~counted, float("inf")).argsort(dim=1, stable=True).argsort(dim=1)
    return order / (counted.sum(1, keepdim=True) - 1).clamp(min=1)


def ranking_loss(predicted: Tensor, wanted: Tensor, counted: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """How badly pairs of tokens are ordered: mean softplus of minus their difference, the one with the greater target first.

    predicted, wanted, counted: [B, T, 3]; first, second: int64 [P], the tokens of every pair. Pairs nearer than GAP do not count.
    """
    place = ranks(wanted, counted)
    apart = place[:, first] - place[:, second]
    counts = counted[:, first] & counted[:, second] & (apart.abs() >= GAP)
    margin = (predicted[:, first] - predicted[:, second]) * apart.sign()
    return (F.softplus(-margin) * counts).sum() / counts.sum().clamp(min=1)


def loss_of(head: SalienceHead, clips: Sequence[Clip]) -> Tensor:
    """Mean over layers of SmoothL1 and ranking loss. The pairs are drawn from torch's own rng, alike for all layers."""
    counted = torch.stack([c.counted for c in clips])
    place, tokens = torch.stack([c.place for c in clips]), counted.shape[1]
    first, second = torch.randint(0, tokens, (2, PAIRS)).to(counted.device)
    total = torch.zeros((), device=counted.device)
    for index in range(head.info.layers):
        layer = head.layer(index)
        predicted = layer(torch.stack([c.hidden[index] for c in clips]), place)
        wanted = layer.target(torch.stack([c.received[index] for c in clips]))
        near = (F.smooth_l1_loss(predicted, wanted, reduction="none") * counted).sum() / counted.sum()
        total = total + near + RANKING * ranking_loss(predicted, wanted, counted, first, second)
    return total / head.info.layers


@torch.no_grad()
def take_statistics(head: SalienceHead, paths: Sequence[Path]) -> None:
    """Sets every layer's mean and deviation of the log attention, counted tokens only, from clip after clip."""
    count = torch.zeros(len(OUT), dtype=torch.float64)
    total = torch.zeros(head.info.layers, len(OUT), dtype=torch.float64)
    square = torch.zeros_like(total)
    for path in paths:
        clip = Clip.load(path)
        values = log_attention(clip.received.double()) * clip.counted
        count += clip.counted.sum(0)
        total += values.sum(1)
        square += values.square().sum(1)
    mean = total / count
    deviation = (square / count - mean.square()).clamp(min=1e-12).sqrt()
    for index in range(head.info.layers):
        head.layer(index).target_mean.copy_(mean[index])
        head.layer(index).target_std.copy_(deviation[index])


def train(folder: Path, info: HeadInfo, paths: Sequence[Path], steps: int, device: torch.device | str = "cpu", save_every: int = 100) -> SalienceHead:
    """Trains on measured clips; `salience.pt` in `folder` is where a stopped run goes on. -> the averaged weights."""
    torch.manual_seed(0)
    head = SalienceHead(info)
    take_statistics(head, paths)
    head.to(device)
    adam = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.01)
    loop = Loop(head, folder / "salience.pt", steps, [adam], DECAY, save_every)

    def loss(step: int) -> Tensor:
        picked = torch.randint(0, len(paths), (min(BATCH, len(paths)),)).tolist()
        return loss_of(head, [Clip.load(paths[i], device) for i in picked])

    with torch.enable_grad():
        loop.run(loss, head.parameters())
    head.load_state_dict(loop.average)
    return head.eval().requires_grad_(False)


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of the ranks of two vectors."""
    every = torch.ones(1, len(a), dtype=torch.bool)
    x, y = (ranks(v[None].cpu(), every)[0] for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-12))


def recall(predicted: Tensor, true: Tensor) -> float:
    """Which share of the true top quarter is in the predicted top quarter; by chance a quarter."""
    n = max(1, len(true) // 4)
    return len(set(predicted.topk(n).indices.tolist()) & set(true.topk(n).indices.tolist())) / n


@torch.no_grad()
def judge(head: SalienceHead, paths: Sequence[Path], device: torch.device | str = "cpu") -> list[dict[str, float]]:
    """Per layer, mean over clips: how well the attention from later chunks is predicted.

    `rank`: Spearman correlation over the tokens of a clip. `rank_in_chunk`: the same within one chunk, where its age says
    nothing. `top_quarter`: share of the true top quarter found.
    """
    rows = []
    clips = [Clip.load(path, device) for path in paths]
    for index in range(head.info.layers):
        ranked, within, found = [], [], []
        for clip in clips:
            sees = clip.counted[:, LOW]
            predicted, true = head.layer(index)(clip.hidden[index], clip.place)[sees, LOW], clip.received[index][sees, LOW]
            chunk = clip.chunk[sees]
            ranked.append(spearman(predicted, true))
            found.append(recall(predicted, true))
            within += [spearman(predicted[chunk == c], true[chunk == c]) for c in chunk.unique().tolist() if int((chunk == c).sum()) > 1]
        figures = {"rank": ranked, "rank_in_chunk": within, "top_quarter": found}
        rows.append({name: round(sum(values) / max(len(values), 1), 3) for name, values in figures.items()})
    return rows


def table(rows: Sequence[dict[str, float]]) -> str:
    names = list(rows[0])
    lines = [["layer", *names], *([str(i), *(f"{row[n]:.3f}" for n in names)] for i, row in enumerate(rows))]
    mean = ["mean", *(f"{sum(row[n] for row in rows) / len(rows):.3f}" for n in names)]
    return "\n".join("  ".join(cell.rjust(len(lines[0][i])) for i, cell in enumerate(line)) for line in [*lines, mean])


def begin(folder: Path, plan: dict[str, Any]) -> None:
    """Notes what a work folder is for. Raises ValueError where it was begun for something else."""
    path = folder / "plan.json"
    if path.exists():
        before = _begun(path)
        if other := [
            f"{k} was {before.get(k)} and is now {plan.get(k)}" for k in sorted(before.keys() | plan.keys()) if before.get(k) != plan.get(k)
        ]:
            raise ValueError(f"the work folder {folder} was begun for another training ({'; '.join(other)}): name another with --work, or remove it")
    write_text(path, json.dumps(plan, indent=1) + "\n")


def _begun(path: Path) -> dict[str, Any]:
    try:
        plan = json_file(path)
        if isinstance(plan, dict):
            return plan
        why = "it is no JSON object"
    except ValueError as error:
        why = str(error)
    raise ValueError(f"{path} does not say what its work folder was begun for ({why}): name another folder with --work, or remove it")


def fingerprint(files: Sequence[Path]) -> str:
    """SHA-256 of files, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while part := opened.read(2**24):
                digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True)
class Subject:
    """The model that a head is trained for, where its clips come from, and the teacher, where that is not the model itself."""

    model: Bundle
    name: str
    files: Sequence[Path]
    source: Source
    job: Job
    taught_by: Bundle | None = None


def subject(args: argparse.Namespace, device: torch.device) -> Subject:
    """What was asked for. Raises ValueError, before the weights of a checkpoint are read, for what cannot be trained."""
    if args.sample_steps is not None and args.sample_steps < 1:
        raise ValueError(f"{args.sample_steps} sampling steps were asked for: at least 1 is needed")
    return _bundled(args, device) if args.model in OURS else _checkpoint(args, device)


def _bundled(args: argparse.Namespace, device: torch.device) -> Subject:
    family, usual = OURS[args.model], OURS[args.model].usual
    model = bundle.load_bundle(fast_dtype() if device.type == "cpu" else torch.bfloat16, device, family)
    prompts = _lines(args.prompts) if args.prompts else [make_scene(i).caption for i in range(PROMPTS)]
    steps = args.sample_steps or min(usual.steps, SAMPLE_STEPS)
    job = Job.usual(family, "", frames=args.frames or FRAMES, size=args.size or SIZE, steps=steps, cfg=args.cfg or usual.cfg)
    check_job(job, model)
    above = bundle.load_bundle(model.network.dtype, device, TAUGHT_BY[model.name]) if model.name in TAUGHT_BY else None
    return Subject(model, model.name, [bundle.files_of(family)[0]], Half(Drawn(model, job), Sampled(model, prompts, job)), job, above)


def _checkpoint(args: argparse.Namespace, device: torch.device) -> Subject:
    if not args.prompts:
        raise ValueError("a checkpoint makes its clips itself and has to be told of what: give a file with one prompt a line (--prompts)")
    prompts, checkpoint = _lines(args.prompts), open_checkpoint(args.model)
    found = recognise(checkpoint.stored, checkpoint.name, checkpoint.metadata)
    family, config = found.family, found.config
    if config.text_dim == UMT5_WIDTH and not args.embeddings:
        raise ValueError(
            f"{checkpoint.name} reads the {UMT5_WIDTH} channels of umT5, which is not at hand here: encode the lines of {args.prompts.name} and the "
            f"empty prompt elsewhere and give the safetensors file with --embeddings: a tensor [tokens, {UMT5_WIDTH}] under each line, one under the "
            "empty key"
        )
    with torch.device("meta"):
        empty, no_vae = family.network(config), nn.Identity()
    if not isinstance(family.adapter(empty, None), Bidirectional):
        raise ValueError(f"{checkpoint.name} is of {family.title}, which only looks back: a salience head is taught by the same model, bidirectional")
    layout = replace(family.layout, chunk_frames=args.chunk_frames, window=args.window)
    model = Bundle(family, empty, no_vae, layout)
    if args.embeddings:
        model = WithEmbeddings(family, empty, no_vae, layout, read_embeddings(args.embeddings, prompts, config.text_dim))
    job = Job("", frames=args.frames or 97, size=args.size or 544, steps=args.sample_steps or SAMPLE_STEPS, cfg=args.cfg or 6.0)
    check_job(job, model)
    Sampled(model, prompts, job)
    network = load_network_file(args.model, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    model = replace(model, network=network)
    return Subject(model, checkpoint.name, checkpoint.files, Sampled(model, prompts, job), job)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return lines_of(path)
    except ValueError as why:
        raise ValueError(f"the prompts file {path} cannot be read: {why}") from None


def run(args: argparse.Namespace) -> None:
    """The whole training. Raises ValueError, before anything is computed, for settings that cannot work."""
    if args.clips < 1 or args.steps < 1 or args.tokens < 2:
        raise ValueError(f"{args.clips} clips, {args.steps} steps, {args.tokens} tokens: at least 1, 1 and 2 are needed")
    if args.model not in OURS and not args.out:
        raise ValueError("where should the head of this checkpoint be written? Name a file with --out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    it = subject(args, device)
    beside = head_at(Salience(str(args.beside)).for_network(it.model.adapter()).path).on(device) if args.beside else None
    config, out = it.model.network.config, args.out or BUNDLED_FOR.get(it.model.adapter().name, BUNDLED)
    held_out = max(2, args.clips // HELD_OUT_SHARE)
    sha = fingerprint(it.files)
    begin(args.work, {
        "model": it.name, "sha256": sha, "clips": args.clips, "steps": args.steps, "tokens": args.tokens,
        "chunk_frames": it.model.layout.chunk_frames,
        "prompts": hashlib.sha256(args.prompts.read_bytes()).hexdigest() if args.prompts else "", "job": asdict(it.job), "head": FIXED,
        **({"teacher": it.taught_by.name} if it.taught_by else {}),
    })  # fmt: skip

    store = ClipStore(args.work / "clips", args.clips, held_out)
    store.fill(it.model, it.source, it.job.fps, args.tokens, it.taught_by)
    teacher = f"{it.taught_by.name if it.taught_by else it.name}, bidirectional, noise levels {', '.join(map(str, LEVELS))}"
    licence = args.licence or ("Apache-2.0" if args.model in OURS else "that of the base model")
    info = HeadInfo(
        config.layers, config.dim, max(1, config.dim // NARROWING), it.model.layout.chunk_frames, it.name, sha, teacher, args.clips, licence
    )
    head = train(args.work, info, store.train, args.steps, device)
    head.save(out)
    print(f"attention from later chunks, predicted on {held_out} held-out clips (by chance: 0, 0 and 0.25)")
    print(table(judge(head, store.held_out, device)))
    if beside:
        print(f"{args.beside.name} on the same clips")
        print(table(judge(beside, store.held_out, device)))
    print(f"{out}: a head for {config.layers} layers of {config.dim} channels, {out.stat().st_size / 1e6:.1f} MB")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND.removeprefix("python -m "), description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--model", default="bundled", help=f"{', '.join(OURS)}, or a checkpoint of {SKYREELS.title}: a file or a folder")
    parser.add_argument("--prompts", type=Path, help="one prompt a line; the bundled model has captions of its own")
    parser.add_argument("--embeddings", type=Path, help="safetensors file with the text embedding of every prompt, where the model reads umT5")
    parser.add_argument("--out", type=Path, help="the head; for the bundled model by default in its own place")
    parser.add_argument("--work", type=Path, default=Path("runs/salience"), help="folder of clips and state; a stopped run goes on from there")
    parser.add_argument("--clips", type=int, default=CLIPS, help="clips to learn from; one more is held out for every six")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the head's training")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens that are kept of a clip")
    parser.add_argument("--sample-steps", type=int,
                        help=f"steps of the films that the model makes itself ({SAMPLE_STEPS}, and those of a model of few steps)")  # fmt: skip
    parser.add_argument("--frames", type=int, help="pixel frames of a clip (57 for the bundled model, else 97)")
    parser.add_argument("--size", type=int, help="pixels of a side (128 for the bundled model, else 544)")
    parser.add_argument("--cfg", type=float, help="guidance of these films (by default that of the bundled model, else 6)")
    parser.add_argument("--chunk-frames", type=int, default=5, help="latent frames of a chunk; of a checkpoint only")
    parser.add_argument("--window", type=int, default=5, help="chunks that the model can look at together; of a checkpoint only")
    parser.add_argument("--licence", help="licence of the head")
    parser.add_argument("--beside", type=Path, help="another head, which is judged on the same held-out clips at the end")
    return parser


def main() -> int:
    try:
        run(arguments().parse_args())
    except ValueError as error:
        print(f"flowcache: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"flowcache: {refused(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flowcache: stopped before it was done; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

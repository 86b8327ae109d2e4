"""The demonstration: the same film through several arms, side by side, with the numbers."""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ..device import commit, device_name, fast_dtype
from ..files import write_text
from ..models.adapter import Bidirectional, require_bidirectional
from ..models.bundle import BUNDLED, NAME, Bundle, load_bundle, weights_id
from ..policies import POLICIES
from ..policies.multirate import Multirate
from ..policies.named import policy_named
from ..policies.planned import Planned
from ..policies.protocol import CachePolicy, PartPolicy, TokenPolicy
from ..ranks.launch import add_arguments as add_ranks
from ..ranks.launch import sharded
from ..ranks.world import ONE, World
from ..run.generate import Job, decode, generate, generate_upstream, warm_up
from ..run.report import RunReport
from ..run.states import States
from ..show.film import frames_of, side_by_side, write_film
from ..show.metrics import psnr, ssim
from ..show.overlay import overlay
from ..show.report_file import write_report

UPSTREAM = "upstream"
OURS: dict[str, CachePolicy | None] = {"uncached": None, "chunkwise": Planned(), "motion": Multirate()}
"""Arms with a KV cache that have a name here; every policy is one by its own name."""
ARMS = (UPSTREAM, *OURS)
USUAL = ARMS[:3]
PROMPT = "red circle moves right, blue square moves down"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", default=PROMPT, help="sprites, colours and directions, such as: %(default)s")
    parser.add_argument("--model", choices=tuple(BUNDLED), default=NAME, help="which of the bundled models (default %(default)s)")
    parser.add_argument("--frames", type=int, help=f"pixel frames, {_defaults('frames')}")
    parser.add_argument("--steps", type=int, help=f"steps per chunk, {_defaults('steps')}")
    parser.add_argument("--arms", default="", help=f"which ways to run it, with commas between: {_there_are()}, with its settings "
                        "behind it if not the usual ones, as in 'planned share=0.3' (default: "
                        f"{','.join(USUAL)}; without {UPSTREAM} where the model looks back only)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for films, map, and report.json")
    add_ranks(parser)
    parser.add_argument("--save-every", type=int, default=0, help="save the state of a film after so many finished chunks, in the folder states of "
                        "--out; a demo that was stopped goes on from there (default %(default)s: off)")  # fmt: skip


def main(args: argparse.Namespace, world: World = ONE) -> None:
    """Raises ValueError, before any file is written, for arguments that cannot work. `world`: the devices that share each film; the first writes
    and prints."""
    asked = _arms(args.arms) if args.arms else ()
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file: name a folder")
    family = BUNDLED[args.model]
    given = {key: value for key in ("frames", "steps") if (value := getattr(args, key)) is not None}
    job = Job.usual(family, args.prompt, seed=args.seed, **given)
    bundle = load_bundle(fast_dtype(), family=family)
    arms = asked or tuple(arm for arm in usual_arms(bundle) if arm != UPSTREAM or world.devices == 1)
    if UPSTREAM in arms:
        require_bidirectional(bundle.adapter())
        if world.devices > 1:
            raise ValueError(f"{UPSTREAM} attends bidirectionally, which runs on one device: leave it out of --arms, or start one process")
    family.check(job.schedule(bundle))
    states, world = States(args.out / "states", args.save_every) if args.save_every else None, sharded(world, bundle.network, family.blocks, args)
    films: dict[str, Tensor] = {}
    reports: dict[str, RunReport] = {}
    decode_s: dict[str, float] = {}
    warm_up(bundle)
    for arm in arms:
        latents, reports[arm] = run_arm(bundle, job, arm, states, world)
        if not world.first:
            continue
        began = time.perf_counter()
        films[arm] = decode(bundle, latents)
        decode_s[arm] = time.perf_counter() - began
    if world.first:
        _write(args.out, bundle, job, films, reports, decode_s)


def _write(out: Path, bundle: Bundle, job: Job, films: dict[str, Tensor], reports: dict[str, RunReport], decode_s: dict[str, float]) -> None:
    arms = tuple(films)
    out.mkdir(parents=True, exist_ok=True)
    rows = [_row(arm, films, reports[arm], decode_s[arm]) for arm in arms]
    for arm in arms:
        file = "_".join(arm.split())
        write_film(out / f"{file}.mp4", frames_of(films[arm]), job.fps)
        write_report(out / f"{file}_map.png", reports[arm])
        for kind in ("json", "csv"):
            write_report(out / f"{file}.{kind}", reports[arm])
        if arm != UPSTREAM and isinstance(policy_of(arm), TokenPolicy | PartPolicy):
            write_film(out / f"{file}_overlay.mp4", _tinted(films[arm], reports[arm]), job.fps)
    write_film(out / "side_by_side.mp4", side_by_side({a: frames_of(f) for a, f in films.items()}), job.fps)
    text = {
        "device": device_name(), "dtype": bundle.dtype, "commit": commit(), "date": f"{date.today()}",
        "weights": weights_id(bundle.family), "model": bundle.name, "prompt": job.prompt,
        "seed": job.seed, "frames": job.frames, "steps": job.steps, "cfg": job.cfg, "ar_step": job.ar_step, "runs": rows,
    }  # fmt: skip
    write_text(out / "report.json", json.dumps(text, indent=1) + "\n")
    print(table(rows))
    for arm in arms:
        if line := reports[arm].saves.line():
            print(f"{arm}: {line}")
        if reports[arm].devices:
            print(*(f"{arm}: {note}" for note in reports[arm].notes[-2:]), sep="\n")
    print(f"films, map and report.json are in {out}")


def usual_arms(bundle: Bundle) -> tuple[str, ...]:
    """Without the upstream way where the network looks back only."""
    return USUAL if isinstance(bundle.adapter(), Bidirectional) else tuple(arm for arm in USUAL if arm != UPSTREAM)


def run_arm(bundle: Bundle, job: Job, arm: str, states: States | None = None, world: World = ONE) -> tuple[Tensor, RunReport]:
    schedules = [w.schedule for w in job.sections(bundle)] if arm == UPSTREAM else [job.schedule(bundle)]
    with tqdm(total=sum(s.chunk_steps for s in schedules), desc=f"{arm:>10}", unit="step", disable=not world.first) as bar:
        if arm == UPSTREAM:
            return generate_upstream(bundle, job, lambda chunk: bar.update(), states=states)
        return generate(bundle, job, policy_of(arm), lambda chunk: bar.update(), states=states, world=world)


def policy_of(arm: str) -> CachePolicy | None:
    """Of an arm with a KV cache: ours, or any policy by its name with its settings behind it. Raises ValueError."""
    return OURS[arm] if arm in OURS else policy_named(*arm.split(maxsplit=1))


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of the report as aligned text; speed is against the uncached arm."""
    base = next((r["wall_s"] for r in rows if r["arm"] == "uncached"), None)
    width = max(10, *(len(r["arm"]) for r in rows))
    lines = [f"{'arm':>{width}}  {'seconds':>8}  {'speed':>6}  {'chunk-steps':>12}  {'tokens':>7}  {'PSNR dB':>8}  {'SSIM':>6}  {'KV MiB':>7}"]
    for r in rows:
        speed = f"{base / r['wall_s']:.2f}x" if base and r["wall_s"] else "-"
        share = f"{r['tokens_computed'] / r['tokens']:.0%}"
        psnr_db, ssim_ = ("-", "-") if r["psnr"] is None else (f"{r['psnr']:.1f}", f"{r['ssim']:.3f}")
        steps, kv = f"{r['chunk_steps_computed']}/{r['chunk_steps']}", r["kv_peak_bytes"] / 2**20
        lines.append(f"{r['arm']:>{width}}  {r['wall_s']:8.2f}  {speed:>6}  {steps:>12}  {share:>7}  {psnr_db:>8}  {ssim_:>6}  {kv:7.1f}")
    return "\n".join(lines)


def _row(arm: str, films: dict[str, Tensor], report: RunReport, decode_s: float) -> dict[str, Any]:
    done = report.as_dict()
    compared = arm != "uncached" and "uncached" in films
    return {
        "arm": arm,
        "wall_s": done["wall_s"],
        "seconds": {**done["seconds"], "decode": round(decode_s, 3)},
        "chunk_steps": done["chunk_steps"],
        "chunk_steps_computed": done["chunk_steps_computed"],
        "chunk_steps_refreshed": done["chunk_steps_refreshed"],
        "tokens": done["tokens"],
        "tokens_computed": done["tokens_computed"],
        "psnr": round(psnr(films[arm], films["uncached"]), 2) if compared else None,
        "ssim": round(ssim(films[arm], films["uncached"]), 4) if compared else None,
        "kv_peak_bytes": done["kv_peak_bytes"],
        "host_syncs": done["host_syncs"],
        "saves": done["saves"],
    }


def _tinted(film: Tensor, report: RunReport) -> np.ndarray:
    """[T, 3, H, W] -> uint8 [T, H, W, 3]: the film under a tint of how often each place was computed."""
    assert report.visits is not None
    tinted, _ = overlay(film.permute(0, 2, 3, 1).numpy(), report.visits, report.map.shape[1], pixels=report.pixels)
    return (tinted * 255).round().astype(np.uint8)


def _arms(text: str) -> tuple[str, ...]:
    """Raises ValueError for an arm that there is not, and for settings that a policy has not."""
    arms = tuple(a.strip() for a in text.split(",") if a.strip())
    names = {*ARMS, *(kind.name for kind in POLICIES)}
    unknown = [a for a in arms if a.split()[0] not in names]
    if unknown or not arms:
        raise ValueError(f"there is no arm {', '.join(unknown) or '(none given)'}: choose from {_there_are()}")
    for arm in arms:
        if arm != UPSTREAM:
            policy_of(arm)
    return arms


def _there_are() -> str:
    return f"{', '.join(ARMS)}, or a cache policy, {', '.join(kind.name for kind in POLICIES)}"


def _defaults(key: str) -> str:
    return f"by default {', '.join(f'{getattr(family.usual, key)} of {name}' for name, family in BUNDLED.items())}"

"""A line of a jobs file that a bundled model makes: its settings, checked by settling the run as it will be sampled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

import torch

from ..kv.compressor import Compressor
from ..kv.named import policy_named as kv_policy_named
from ..models.bundle import BUNDLED, NAME, Bundle, load_bundle, weights_id
from ..policies.named import policy_named
from ..policies.presets import MAGI_RULES, PRESETS, preset
from ..policies.protocol import CachePolicy
from ..run.generate import Guided, Job, run_of
from ..run.identity import digest, film_of, key_of
from ..run.run import Run
from ..untrusted import ELEMENTS, short
from .jobs_file import require_known, typed
from .tasks import Asked, FilmTask

OF_JOB: dict[str, Any] = {field.name: field.default for field in fields(Job) if field.name not in ("prompt", "denoise", "overlap")}
"""Settings of a job with a value of their kind. A given film, and sections, are not offered."""
OF_HISTORY: dict[str, Any] = {field.name: field.default for field in fields(Compressor) if field.name != "policy"}
KNOWN = ("prompt", *OF_JOB, "seconds", "model", "policy", "history", "name")
SEEDS = 1 << 64
UNCACHED = "uncached"


class FilmLines:
    """Reads lines of films that are computed in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.bundle_of = lru_cache(lambda name: load_bundle(dtype, family=BUNDLED[name]))
        self._weights = lru_cache(lambda name: digest(self.bundle_of(name).network))

    def task(self, line: int, asked: Asked) -> FilmTask:
        """Raises ValueError, with the way out, for what cannot be made."""
        if "workflow" in asked:
            raise ValueError("it names a workflow, and those are run by ComfyUI servers: add --host URL")
        require_known(asked, KNOWN, "a film")
        bundle = self.bundle_of(_model(asked))
        job, policy, compressor = _job(asked, bundle), _policy(asked), _compressor(asked)
        run = run_of(bundle, job, policy, compressor)
        title = typed(asked, "name", "") or job.prompt
        return FilmTask(line, self._key(bundle, job, run), title, asked, bundle.name, job, policy, compressor)

    def _key(self, bundle: Bundle, job: Job, run: Run) -> str:
        """Of all that the film depends on. Noise counts by its seed and shape: it is not made."""
        noise, more = torch.empty(job.noise_shape(bundle), device="meta"), {"network": self._weights(bundle.name), "vae": weights_id(bundle.family)}
        return key_of(film_of(run, noise, {**Guided(bundle, job).texts, **more}))


def _model(asked: Asked) -> str:
    name = typed(asked, "model", NAME)
    if name not in BUNDLED:
        raise ValueError(f"there is no model {short(name)}: there are {', '.join(BUNDLED)}; other models are run by ComfyUI servers (--host)")
    return name


def _job(asked: Asked, bundle: Bundle) -> Job:
    if "prompt" not in asked:
        raise ValueError("it has no prompt")
    given = {name: typed(asked, name, like) for name, like in OF_JOB.items() if name in asked}
    if "seconds" in asked:
        given["frames"] = _frames(asked, bundle)
    if not 0 <= given.get("seed", 0) < SEEDS:
        raise ValueError(f"seed is {given['seed']}: it must lie between 0 and {SEEDS - 1}")
    job = Job.usual(bundle.family, typed(asked, "prompt", ""), **given)
    job.schedule(bundle)
    if math.prod(job.noise_shape(bundle)) > ELEMENTS:
        raise ValueError(f"{job.frames} frames of {job.picture[1]} x {job.picture[0]} pixels are more than any memory holds: make the film smaller")
    return job


def _frames(asked: Asked, bundle: Bundle) -> int:
    """The nearest length in whole chunks."""
    seconds, layout = typed(asked, "seconds", 0.0), bundle.layout
    if "frames" in asked:
        raise ValueError("it has frames and seconds: leave one of them out")
    if not 0 < seconds <= 1e6:
        raise ValueError(f"seconds is {seconds:g}: it must be above 0, and at most 1000000")
    wanted = max(round(seconds * layout.fps), 1)
    return min(bundle.family.frames.nearest(wanted, layout.chunk_frames), key=lambda frames: abs(frames - wanted))


def _policy(asked: Asked) -> CachePolicy | None:
    """A preset of Chunkwise Cache, or any policy by its name with its settings behind it."""
    text = typed(asked, "policy", UNCACHED).strip() or UNCACHED
    if text == UNCACHED:
        return None
    return preset(text) if text in {**PRESETS, **MAGI_RULES} else policy_named(*text.split(maxsplit=1))


def _compressor(asked: Asked) -> Compressor | None:
    """Raises ValueError for what is no budget of history."""
    history = asked.get("history")
    if history is None:
        return None
    if not isinstance(history, Mapping):
        raise ValueError(f"history is {short(history)}: it must be an object, such as " + '{"policy": "even", "budget": 2.0, "unit": "chunks"}')
    require_known(history, ("policy", *OF_HISTORY), "history")
    policy = kv_policy_named(*(typed(history, "policy", "even").strip() or "even").split(maxsplit=1))
    return Compressor(policy, **{name: typed(history, name, like) for name, like in OF_HISTORY.items() if name in history})

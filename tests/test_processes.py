"""A film is the same bit for bit wherever it is made: twice in one process, or in another."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.named import policy_named
from flowcache_core.models.bundle import Bundle, load_bundle
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.run.generate import Job, generate

JOB = Job("red circle moves left", frames=33, steps=6, seed=3, size=32, ar_step=3)
LONG = replace(JOB, frames=57, steps=4, ar_step=2)
FILMS: dict[str, Callable[[Bundle], torch.Tensor]] = {
    "uncached": lambda b: generate(b, JOB)[0],
    "planned": lambda b: generate(b, JOB, Planned(share=0.5))[0],
    "motion": lambda b: generate(b, JOB, Motion(0.6, base=Chunkwise(0.6, 2), coarse=0.3, min_refresh=0.0))[0],
    "motion-plan": lambda b: generate(b, JOB, Multirate(share=0.4))[0],
    "budget": lambda b: generate(b, LONG, compressor=Compressor(policy_named("importance-redundancy", ""), 1.5))[0],
    "budget int8": lambda b: generate(b, LONG, compressor=Compressor(policy_named("even", ""), 1.5, dtype="int8"))[0],
}


def digests(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the latents of each film, made in this order by one process."""
    torch.set_num_threads(1)
    bundle = load_bundle()
    return {name: hashlib.sha256(FILMS[name](bundle).contiguous().numpy().tobytes()).hexdigest() for name in names}


def elsewhere(hash_seed: int) -> dict[str, str]:
    """The same by a process of its own, in which sets and dicts of strings are in another order."""
    script = "import json; from tests.test_processes import FILMS, digests; print(json.dumps(digests(FILMS)))"
    env = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_two_runs_in_one_process_equal_two_runs_in_two_processes() -> None:
    """This process makes its films in the opposite order, so that what one run leaves behind would show in the next."""
    here = digests(reversed(FILMS))
    assert elsewhere(1) == elsewhere(2) == here
    assert len(set(here.values())) == len(FILMS)

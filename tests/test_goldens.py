"""Films as they were: a change of structure leaves every latent as it is, bit for bit.

On the kind of machine on which they were written, equal means equal bits; elsewhere arithmetic rounds otherwise, and equal means close.
`python tests/test_goldens.py` writes them anew, for a change that is meant to change films.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flowcache_core.bench.increment import incremental
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.named import policy_named
from flowcache_core.models.bundle import Bundle, load_bundle
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.presets import preset
from flowcache_core.policies.target import Target
from flowcache_core.run.generate import Given, Job, generate, generate_upstream

GOLDENS = Path(__file__).parent / "goldens" / "films.safetensors"
JOB = Job("red circle moves left", frames=33, steps=12, seed=3, size=32, ar_step=3)
LONG = replace(JOB, frames=69, steps=8, ar_step=2)
CLOSE = 2e-2


def given() -> Given:
    rng = torch.Generator().manual_seed(9)
    start, end = (torch.randn(1, 16, n, 4, 4, generator=rng) for n in (2, 1))
    return Given(start, end)


def repaint() -> Given:
    return Given(film=torch.randn(1, 16, 9, 4, 4, generator=torch.Generator().manual_seed(4)))


def compressor(name: str, settings: str = "", **more: object) -> Compressor:
    return Compressor(policy_named(name, settings), budget=1.5, unit="chunks", **more)  # type: ignore[arg-type]


FILMS: dict[str, Callable[[Bundle], Tensor]] = {
    "uncached": lambda b: generate(b, JOB)[0],
    "one-branch": lambda b: generate(b, replace(JOB, cfg=1.0))[0],
    "euler": lambda b: generate(b, replace(JOB, solver="euler"))[0],
    "given": lambda b: generate(b, JOB, given=given())[0],
    "repaint": lambda b: generate(b, replace(JOB, denoise=0.6), given=repaint())[0],
    "chunkwise": lambda b: generate(b, JOB, Chunkwise(warmup_steps=2))[0],
    "chunkwise-latent": lambda b: generate(b, JOB, Chunkwise(signature="latent", replay="residual", warmup_steps=2))[0],
    "published": lambda b: generate(b, JOB, preset("flowcache-slow"))[0],
    "increment": lambda b: generate(b, replace(JOB, solver="euler"), Chunkwise(0.2, 2, replay="residual", order=0), adapter=incremental)[0],
    "target": lambda b: generate(b, JOB, Target(share=0.5, warmup_steps=2))[0],
    "planned": lambda b: generate(b, JOB, Planned(share=0.5))[0],
    "planned-given": lambda b: generate(b, JOB, Planned(share=0.4), given=given())[0],
    "planned-euler": lambda b: generate(b, replace(JOB, solver="euler"), Planned(share=0.5))[0],
    "motion": lambda b: generate(b, JOB, Motion(base=Chunkwise(warmup_steps=2), coarse=0.3))[0],
    "motion-output": lambda b: generate(b, JOB, Motion(base=Chunkwise(warmup_steps=2), coarse=0.3, measure="output"))[0],
    "motion-plan": lambda b: generate(b, JOB, Multirate(share=0.5))[0],
    "budget-even": lambda b: generate(b, LONG, compressor=compressor("even"))[0],
    "budget-importance": lambda b: generate(b, LONG, compressor=compressor("importance-redundancy"))[0],
    "budget-salience": lambda b: generate(b, LONG, compressor=compressor("salience"))[0],
    "budget-int8": lambda b: generate(b, LONG, compressor=compressor("r-kv", dtype="int8"))[0],
    "budget-planned": lambda b: generate(b, LONG, Planned(share=0.5), compressor=compressor("expected-attention"))[0],
    "upstream": lambda b: generate_upstream(b, replace(LONG, steps=4))[0],
    "upstream-planned": lambda b: generate_upstream(b, JOB, policy=Planned(share=0.6))[0],
    "upstream-given": lambda b: generate_upstream(b, replace(JOB, steps=6), given=given())[0],
}  # fmt: skip


def machine() -> str:
    """What the bits of a film depend on."""
    cpu = (
        next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
        if platform.system() == "Linux"
        else ""
    )
    return f"{platform.machine()} {cpu.partition(':')[2].strip()} {torch.backends.cpu.get_cpu_capability()} torch {torch.__version__}"


@pytest.mark.parametrize("name", FILMS)
def test_a_film_stays_as_it_was(name: str, bundle: Bundle) -> None:
    film = FILMS[name](bundle)
    with safe_open(GOLDENS, "pt") as file:
        golden, written_on = file.get_tensor(name), file.metadata()["machine"]
    if written_on == machine():
        assert torch.equal(film, golden), f"{name} is off by up to {(film - golden).abs().max():.3g}"
    else:
        torch.testing.assert_close(film, golden, atol=CLOSE, rtol=CLOSE)


def test_every_golden_is_compared() -> None:
    with safe_open(GOLDENS, "pt") as file:
        assert sorted(file.keys()) == sorted(FILMS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tiny = load_bundle()
    save_file({name: make(tiny) for name, make in FILMS.items()}, GOLDENS, {"machine": machine()})

"""What all tests share: a tiny random network, one prompt, and the two ways to sample a film with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.models.attention import BlockCausal
from flowcache_core.models.bundle import Bundle, load_bundle
from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.run.report import RunReport
from flowcache_core.run.session import Session
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas, timestep
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler, Solver
from tests import hostless, resuming
from tests.driven import Driven, sample_section
from tests.host import PACK, Graph, Host, put, small

CHANNELS, SIDE, TEXT = 16, 4, 64

Cached = Callable[..., tuple[Tensor, RunReport]]
Dense = Callable[..., Tensor]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Everything here is too small to share; with a second thread a busy machine takes ten times as long."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def make_net() -> Callable[..., SkyReelsV2]:
    """A network of random weights: everything matters, nothing starts at zero."""

    def make(seed: int = 0, layers: int = 2, fps: bool = True) -> SkyReelsV2:
        torch.manual_seed(seed)
        net = SkyReelsV2(SkyReelsConfig(128, 256, layers, TEXT, fps=fps))
        for p in net.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.05)
        return net.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def net(make_net: Callable[..., SkyReelsV2]) -> SkyReelsV2:
    return make_net()


@pytest.fixture(scope="session")
def texts() -> Tensor:
    """Two prompts, [2, 8, text_dim]."""
    return torch.randn(2, 8, TEXT, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def noise_of() -> Callable[..., Tensor]:
    def make(frames: int, seed: int = 1, batch: int = 1, side: int = SIDE) -> Tensor:
        return torch.randn(batch, CHANNELS, frames, side, side, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    """The tiny model that comes with the pack."""
    return load_bundle()


@pytest.fixture
def cached(net: SkyReelsV2, texts: Tensor) -> Cached:
    """Chunk by chunk against the KV cache -> latents, report."""

    def run(noise: Tensor, schedule: ChunkSchedule, solver: Solver | None = None, policy: CachePolicy | None = None, network: SkyReelsV2 = net,
            sigmas: Sequence[float] | None = None) -> tuple[Tensor, RunReport]:  # fmt: skip
        levels = sigmas or flow_sigmas(schedule.steps)
        with Session(SkyReelsAdapter(network), schedule, levels, tuple(noise.shape[3:]), policy=policy) as session:
            out = sample_chunks(
                Driven(lambda x, chunk: session.denoise(x, chunk, texts[:1], ("cond",)), session), noise, schedule, levels, solver or Euler()
            )
        return out, session.report

    return run


@pytest.fixture
def dense(net: SkyReelsV2, texts: Tensor) -> Dense:
    """The whole window in every row, block-causal, without any cache -> latents."""

    def run(noise: Tensor, schedule: ChunkSchedule, solver: Solver | None = None) -> Tensor:
        ends = [sum(schedule.span(k)) * (noise.shape[3] // 2) * (noise.shape[4] // 2) for k in range(schedule.chunks)]
        text = net.text_kv(texts[:1])

        def predict(x: Tensor, sigmas: Tensor, row: object) -> Tensor:
            return net(x, torch.tensor([[timestep(float(s)) for s in sigmas]]), text, BlockCausal(ends))

        return sample_section(predict, noise, schedule, flow_sigmas(schedule.steps), solver or Euler())

    return run


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """In float32, in which films are compared with those of the core."""
    with Host(tmp_path_factory.mktemp("comfy"), options=("--fp32-unet",)) as running:
        yield running


@pytest.fixture
def planned() -> Graph:
    """The shipped workflow, three chunks of three latent frames: Chunkwise Cache with preset balanced."""
    whole = small(json.loads((PACK / "workflows" / "api" / "text_to_video.json").read_text()), steps=10, length=33)
    return put(whole, "FlowCacheLatent", width=64, height=64)


@pytest.fixture
def graph() -> Graph:
    """The shipped workflow with the threshold rule, one chunk."""
    return put(small(json.loads((PACK / "workflows" / "api" / "text_to_video.json").read_text())), "FlowCacheChunkwise", preset="custom")


@pytest.fixture
def resumable(make_net: Callable[..., SkyReelsV2], texts: Tensor, noise_of: Callable[..., Tensor]) -> Callable[..., resuming.Setup]:
    """Makes a run that can be stopped and go on."""
    return resuming.resumable(make_net, texts, noise_of)


@pytest.fixture
def salience_head(tmp_path: Path) -> Path:
    return resuming.save_head(tmp_path / "head.safetensors")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> hostless.Server:
    """The host's, which keeps what it is given to send."""
    module, one = ModuleType("server"), hostless.Server()
    module.PromptServer = SimpleNamespace(instance=one)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "server", module)
    return one


@pytest.fixture
def nodes(server: hostless.Server) -> Iterator[Callable[[str], Any]]:
    """Modules of nodes/ that need nothing of the host but its server."""
    with hostless.loaded() as module:
        yield module

"""The published rules for MAGI-1, of FlowCache (ICLR 2026) and MotionCache (arXiv 2605.01725), against their released code: both run, decision by
decision.

FLOWCACHE_PATH and MOTIONCACHE_PATH name folders of checkouts; without them the tests are skipped. A film is made by the released pipeline. A function
of single tokens takes the place of the network, and the patch embedding only rearranges, so that drift behind it is drift of the latents; schedule,
decisions and replay are the released ones. Modules of distributed runs and the one pattern of einops are stand-ins.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowcache_core.bench.increment import incremental
from flowcache_core.kernels.tokens import mask_over
from flowcache_core.models.adapter import Call
from flowcache_core.models.magi_family import MAGI
from flowcache_core.network import Attend
from flowcache_core.policies.motion import PRESETS
from flowcache_core.policies.presets import preset
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.run.session import Session
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler
from tests.driven import Driven
from tests.formula import Fields
from tests.released import Torch, checkout, imported, module
from tests.released_rules import MAGI_FOLDER, Made, letters


@pytest.fixture(scope="module", autouse=True)
def einops() -> Iterator[None]:
    """Released functions import it when they run, for one pattern."""

    def rearrange(x: Tensor, pattern: str) -> Tensor:
        assert pattern == "N C T H W -> (T H W) N C"
        return x.flatten(2).permute(2, 0, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "einops", module("einops", rearrange=rearrange))
        yield


CHANNELS, WIDTH, SIDE, STEPS, WINDOW = 4, 6, 8, 64, 4
TOKENS = WIDTH * SIDE * SIDE // 4


def patches(x: Tensor) -> Tensor:
    """[N, C, F, h, w] -> [N, F * h/2 * w/2, C * 4]."""
    n, c, f, h, w = x.shape
    return x.view(n, c, f, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).reshape(n, f * h * w // 4, c * 4)


def unpatched(tokens: Tensor) -> Tensor:
    x = tokens.reshape(len(tokens), WIDTH, SIDE // 2, SIDE // 2, CHANNELS, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
    return x.reshape(len(tokens), CHANNELS, WIDTH, SIDE, SIDE)


class Towards:
    """Velocity, clean - noise, of every token by itself: towards a clean latent that depends on where the token is now. `rough`: how strongly."""

    def __init__(self, seed: int, rough: float = 1.0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.mix, self.turn = torch.randn(2, CHANNELS * 4, CHANNELS * 4, generator=rng) * rough / (CHANNELS * 4) ** 0.5

    def __call__(self, tokens: Tensor, time: float) -> Tensor:
        """[..., C * 4], time 0 noise to 1 clean."""
        clean = (tokens @ self.mix + time * (tokens @ self.turn).sin()).tanh()
        return (clean - tokens) / (1.1 - time)


def pipeline_stubs() -> dict[str, ModuleType]:
    def nothing(*_: Any, **__: Any) -> None: ...

    names = ("InferenceParams", "ModelMetaArgs", "event_path_timer", "print_rank_0")
    prompts = ("get_negative_special_token_keys", "get_special_token_keys", "pad_special_token")
    parallel = module("inference.infra.distributed.parallel_state")
    return {
        "inference.common": module("inference.common", **dict.fromkeys(names, nothing), PackedCrossAttnParams=CrossAttention),
        "inference.infra": module("inference.infra"),
        "inference.infra.distributed": module("inference.infra.distributed", parallel_state=parallel),
        "inference.infra.distributed.parallel_state": parallel,
        "inference.infra.parallelism": module("inference.infra.parallelism", pp_scheduler=nothing),
        "inference.pipeline.prompt_process": module("inference.pipeline.prompt_process", **dict.fromkeys(prompts, nothing)),
    }


@dataclass(frozen=True)
class CrossAttention:
    q_ranges: Any = None
    kv_ranges: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_kv: Any = None
    max_seqlen_q: Any = None
    max_seqlen_kv: Any = None


@dataclass(frozen=True)
class Meta:
    cross_attn_params: CrossAttention = CrossAttention()


def twice(x: Tensor) -> Tensor:
    """As the released latents lie, where there is no guidance."""
    return torch.cat([x, x])


class StandIn:
    """In place of the released network: what the released rules ask of it. It notes which tokens it was given."""

    y_embedder = True
    pre_process = post_process = True
    model_config = SimpleNamespace(x_rescale_factor=1, half_channel_vae=False, params_dtype=torch.float32, patch_size=2, t_patch_size=1)
    runtime_config = SimpleNamespace(chunk_width=WIDTH, window_size=WINDOW, noise2clean_kvrange=[], clean_chunk_kvrange=1)
    engine_config = SimpleNamespace(distill_nearly_clean_chunk_threshold=0.3)
    forward: Callable[..., dict[int, Any]]

    def __init__(self, velocity: Towards, embed: Callable[[Tensor], Tensor]) -> None:
        self.x_embedder = embed
        self.videodit_blocks = SimpleNamespace(layers=[], forward=lambda hidden_states, condition, **_: velocity(hidden_states, condition))
        self.row = 0
        self.ran: dict[tuple[int, int], Tensor] = {}

    def forward_dispatcher(self, x: Tensor, timestep: Tensor, y: Tensor, mask: Tensor, kv_range: Tensor, inference_params: Any, **kw: Any) -> Any:
        kw["distill_nearly_clean_chunk"] = False  # the chunk that the presets discard
        out = self.forward(x[:1], timestep[:1], y, xattn_mask=mask, kv_range=kv_range, inference_params=inference_params, **kw)
        return {index: one | {"output": twice(one["output"])} if isinstance(one, dict) else twice(one) for index, one in out.items()}

    def forward_pre_process(self, x: Tensor, t: Tensor, y: Tensor, dropout: Any, mask: Any, kv_range: Any, **kw: Any) -> tuple[Any, ...]:
        chosen = kw["sparse_token_indices"] if kw.get("is_sparse_forward") else torch.arange(TOKENS)
        self.ran[kw["start_chunk_id"], self.row] = torch.zeros(TOKENS, dtype=torch.bool).index_fill_(0, chosen, True)
        return patches(x).transpose(0, 1), float(t), torch.zeros(TOKENS, 1), None, torch.zeros(TOKENS, 1), Meta()

    def forward_post_process(self, out: Tensor, meta: Meta) -> Tensor:
        return unpatched(out.transpose(0, 1))


def rearranged(x: Tensor) -> Tensor:
    """[N, C, F, h, w] -> [N, C * 4, F, h/2, w/2]."""
    n, _, f, h, w = x.shape
    return patches(x).transpose(1, 2).reshape(n, -1, f, h // 2, w // 2)


def transport(sampler: type, model: StandIn, noise: Tensor) -> Any:
    """The released sampler of one film, without what its constructor needs a group of processes for."""
    made, chunks, released = object.__new__(sampler), noise.shape[2] // WIDTH, sampler.__init__.__globals__  # type: ignore[misc]
    texts = torch.zeros(2, chunks, 1, 1)
    film = SimpleNamespace(latent_size=noise.shape, chunk_num=chunks, num_steps=STEPS, y=texts, emb_masks=texts, prefix_video=None)
    made.model, made.transport_inputs, made.device, made.xs = model, [film], torch.device("cpu"), [twice(noise)]
    made.model_config, made.runtime_config, made.engine_config = model.model_config, model.runtime_config, model.engine_config
    made.chunk_width, made.window_size, made.chunk_denoise_count = WIDTH, WINDOW, [Counter()]
    made.ts, made.time_interval = [released["init_t"]({}, STEPS, "cpu")], [released["init_intervel"](STEPS, "cpu")]
    made.x_chunks, made.velocities, made.inference_params = [None], [None], [SimpleNamespace(kv_compressed=False)]
    return made


def released_film(made: Any, before_last: Callable[[], None] = lambda: None) -> tuple[Tensor, Made]:
    model, counts, computed = made.model, made.chunk_denoise_count[0], {}
    rows = made.total_forward_step(0)
    for model.row in range(rows):
        if model.row == rows - 1:
            before_last()
        before = Counter(counts)
        made.forward_velocity(0, model.row)
        made.integrate_velocity(0, model.row)
        for index in counts - before:
            computed[index, before[index]] = model.ran.get((index, model.row), torch.zeros(TOKENS, dtype=torch.bool))
    return made.xs[0][:1], computed


class Field(Fields):
    """The same function behind the adapter seam. It notes which tokens it was asked for."""

    patch, width = 2, CHANNELS * 4

    def __init__(self, velocity: Towards) -> None:
        self.velocity = velocity
        self.ran: Made = {}

    def forward(self, call: Call, attend: Attend, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not call.chunk.committing:
            self.ran[call.chunk.index, call.chunk.step] = torch.ones(TOKENS, dtype=torch.bool) if chosen is None else chosen
        tokens = -self.velocity(patches(call.x), 1 - call.sigma)
        return unpatched(tokens), torch.zeros_like(tokens)

    def refresh(self, call: Call, tokens: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        velocity, nothing = self.forward(call, attend, torch.zeros(TOKENS, dtype=torch.bool).index_fill_(0, tokens, True))
        return torch.where(mask_over(velocity, tokens, (WIDTH, SIDE // 2, SIDE // 2)), velocity, 0), nothing[:, tokens]

    def output(self, call: Call, residual: Tensor) -> Tensor:
        return residual

    def made(self, chunks: int) -> Made:
        none = torch.zeros(TOKENS, dtype=torch.bool)
        return {(index, step): self.ran.get((index, step), none) for index in range(chunks) for step in range(STEPS)}


def our_film(noise: Tensor, velocity: Towards, policy: CachePolicy) -> tuple[Tensor, Made]:
    """With the increments of the latents replayed, as `bench magi` does for its published arms."""
    schedule = ChunkSchedule(noise.shape[2], WIDTH, STEPS, STEPS // WINDOW, WINDOW)
    sigmas = MAGI.noise.levels(STEPS, 3.0)
    adapter = Field(velocity)
    with Session(incremental(adapter, sigmas), schedule, sigmas, (SIDE, SIDE), policy=policy) as session:  # type: ignore[arg-type]
        film = sample_chunks(Driven(lambda x, chunk: session.denoise(x, chunk, x, ("text",)), session), noise, schedule, sigmas, Euler())
    return film, adapter.made(schedule.chunks)


def noise_of_chunks(chunks: int, seed: int) -> Tensor:
    return torch.randn(1, CHANNELS, chunks * WIDTH, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def flow_magi() -> Any:
    root = checkout("FLOWCACHE_PATH", f"{MAGI_FOLDER}/inference/pipeline/flowcache.py") / MAGI_FOLDER
    stubs = {
        **pipeline_stubs(),
        "inference.pipeline": module("inference.pipeline", MagiPipeline=None),
        "inference.pipeline.kvcompress": module("inference.pipeline.kvcompress", replace_magi=None),
        "inference.pipeline.kvcompress.utils": module("inference.pipeline.kvcompress.utils", ChunkKVRangeTracker=None),
    }
    return imported(root, "inference.pipeline.flowcache", stubs)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("name", "threshold"), [("flowcache-magi-slow", 0.01), ("flowcache-magi-fast", 0.015)])
def test_magi_chunks_are_computed_when_the_released_rule_computes_them(flow_magi: Any, name: str, threshold: float, seed: int) -> None:
    noise, velocity = noise_of_chunks(6, seed), Towards(seed)
    flow_magi.setup_flowcache(rel_l1_thresh=threshold, warmup_steps=5, discard_nearly_clean_chunk=True, compress_kv_cache=False)
    theirs, expected = released_film(transport(flow_magi.SampleTransport, StandIn(velocity, rearranged), noise))
    ours, made = our_film(noise, velocity, replace(preset(name), replay="residual"))
    for index in range(6):
        assert letters(made, index, STEPS) == letters(expected, index, STEPS)
    assert "r" in letters(made, 0, STEPS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def motion_magi() -> Any:
    root = checkout("MOTIONCACHE_PATH", "MotionCache4MAGI-1/inference/pipeline/flowcache.py") / "MotionCache4MAGI-1"
    stubs = {
        **pipeline_stubs(),
        "inference.pipeline": module("inference.pipeline", MagiPipeline=None),
        "inference.pipeline.utils": module("inference.pipeline.utils", get_tensors_memory_usage=lambda *_: 0.0),
        "inference.rkv": module("inference.rkv", replace_magi=None),
        "inference.rkv.utils": module("inference.rkv.utils", ChunkKVRangeTracker=None),
    }
    out = imported(root, "inference.pipeline.flowcache", stubs)
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 0.0)
    out.torch = Torch(cuda=SimpleNamespace(Event=lambda **_: event, synchronize=lambda: None))
    return out


def motion_transport(motion_magi: Any, model: StandIn, noise: Tensor, threshold: float) -> Any:
    """With the released settings (addconfig/config.yaml) at `threshold`."""
    kind = motion_magi.SampleTransport
    kind.forward_velocity, kind.integrate_velocity = motion_magi.teacache_forward_velocity, motion_magi.teacache_integrate_velocity
    made = transport(kind, model, noise)
    settings = {
        "rel_l1_thresh": threshold, "token_rel_l1_thresh": threshold, "warmup_steps": 5, "chunk_wise_only_steps": 20, "token_wise_reuse": True,
        "tokenwise_l1_mode": "chunk", "temporal_weight_floor": 0.6, "temporal_weight_power": 1.0, "max_token_reuse_ratio": 1.0,
        "initial_token_reuse_ratio": None, "final_token_reuse_ratio": None, "discard_nearly_clean_chunk": True, "whole_calc_when_cross": False,
        "compress_kv_cache": False, "chunk_accumulated_rel_l1": None, "previous_residual": None, "token_accumulated_rel_l1": None,
        "token_reuse_masks": None, "print_token_stats": False, "cnt": 0,
    }  # fmt: skip
    vars(made).update(settings)
    return made


@pytest.mark.parametrize(("threshold", "seed"), [(0.0065, 0), (0.01, 1)])
def test_magi_tokens_are_refreshed_when_the_released_rule_refreshes_them(motion_magi: Any, threshold: float, seed: int) -> None:
    """In its last row the released code takes the tokens of the row before, for it measures nothing there; its masks are cleared before that."""
    rule = PRESETS["magi-1"]
    assert rule.threshold == rule.chunkwise.threshold == 0.0065
    noise, velocity = noise_of_chunks(4, seed), Towards(seed)
    made = motion_transport(motion_magi, StandIn(velocity, rearranged), noise, threshold)
    theirs, expected = released_film(made, lambda: made.token_reuse_masks.clear())
    ours, mine = our_film(noise, velocity, replace(rule, threshold=threshold, base=replace(rule.chunkwise, threshold=threshold, replay="residual")))
    for place in expected:
        assert torch.equal(mine[place], expected[place]), place
    assert mine.keys() == expected.keys()
    assert {*letters(mine, 0, STEPS)} == {*"Crf"}
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)

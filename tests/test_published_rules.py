"""The published rules, FlowCache (ICLR 2026) and MotionCache (arXiv 2605.01725), against their released code: both run, decision by decision.

FLOWCACHE_PATH and MOTIONCACHE_PATH name folders of checkouts; without them the tests are skipped. What stands in for what: for MAGI-1 a function of
single tokens takes the place of the network, and the patch embedding only rearranges, so that drift behind it is drift of the latents; schedule,
decisions and replay are the released ones. For SkyReels-V2 the released network runs, small, in float32 where it says bfloat16, with PyTorch's
attention and Euler steps. Modules of distributed runs, Diffusers, and the one pattern of einops are stand-ins, and keys stay off the GPU.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowcache_core.bench.increment import incremental
from flowcache_core.kernels.tokens import mask_over
from flowcache_core.kv.evict import select
from flowcache_core.kv.scores.importance import ImportanceRedundancy
from flowcache_core.models.adapter import Call
from flowcache_core.models.checkpoint import load_network
from flowcache_core.models.magi_family import MAGI
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.models.skyreels_polynomials import POLYNOMIALS
from flowcache_core.network import Attend
from flowcache_core.policies.motion import PRESETS
from flowcache_core.policies.presets import preset
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas, timestep
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler
from tests.driven import Driven
from tests.formula import Fields
from tests.released import Torch, checkout, imported, module, sdpa

MAGI_FOLDER, SKYREELS_FOLDER = "FlowCache4MAGI-1", "FlowCache4SkyReels-V2"
Made = dict[tuple[int, int], Tensor]
"""Of every chunk and step: which tokens were computed, bool [tokens]."""


@pytest.fixture(scope="module", autouse=True)
def einops() -> Iterator[None]:
    """Released functions import it when they run, for one pattern."""

    def rearrange(x: Tensor, pattern: str) -> Tensor:
        assert pattern == "N C T H W -> (T H W) N C"
        return x.flatten(2).permute(2, 0, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "einops", module("einops", rearrange=rearrange))
        yield


# MAGI-1: a film by the released pipeline, whose network is a function of single tokens

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


def letters(made: Made, index: int, steps: int = STEPS) -> str:
    """Of a chunk: C whole, r not at all, f in part."""
    return "".join("C" if (now := made[index, step]).all() else "f" if now.any() else "r" for step in range(steps))


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
        assert letters(made, index) == letters(expected, index)
    assert "r" in letters(made, 0)
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
    assert {*letters(mine, 0)} == {*"Crf"}
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


# SkyReels-V2: the released network, small and of random weights, row after row of the released schedule

DIM, FFN, LAYERS, TEXT, GROUP, GROUPS, LEVELS, LAG, SCALE = 256, 256, 2, 64, 3, 3, 30, 5, 3.0
POLYNOMIAL = POLYNOMIALS[1536, 30]
quiet = pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")


def released_network(root: Path, name: str, seed: int) -> Any:
    """In float32 throughout; its blocks return bfloat16. The frame rate has most of the time modulation, so that this changes as slowly as in the
    released weights, for which the polynomial was made."""
    package = "skyreels_v2_infer.modules"
    stubs = {
        **{key: module(key) for key in ("diffusers", "diffusers.models")},
        "diffusers.configuration_utils": module("configuration_utils", ConfigMixin=type("ConfigMixin", (), {}), register_to_config=lambda made: made),
        "diffusers.loaders": module("loaders", PeftAdapterMixin=type("PeftAdapterMixin", (), {})),
        "diffusers.models.modeling_utils": module("modeling_utils", ModelMixin=nn.Module),
        f"{package}.attention": module(f"{package}.attention", flash_attention=sdpa),
    }
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(torch, "compile", lambda made=None, **_: made or (lambda function: function))
        out = imported(root, f"{package}.{name}", stubs)
    out.torch = Torch(bfloat16=torch.float32)
    torch.manual_seed(seed)
    network = out.WanModel(text_dim=TEXT, dim=DIM, ffn_dim=FFN, num_heads=DIM // 128, num_layers=LAYERS, inject_sample_info=True)
    for p in network.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.05)
    nn.init.normal_(network.fps_projection[2].bias, std=0.5)
    network.time_projection[1].weight.data *= (0.1, 0.06)[seed]
    network.group_size, network.num_groups, network.inference_steps = GROUP, GROUPS, LEVELS
    for count in ("cnt_even", "cnt_odd"):
        setattr(network, count, [0] * GROUPS)
    return network.eval().requires_grad_(False)


def released_rows(root: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps, step numbers from 1, and what moves, each [rows, frames]."""
    package = "skyreels_v2_infer"
    names = {
        "diffusers": {}, "diffusers.utils": {}, "diffusers.image_processor": {"PipelineImageInput": None},
        "diffusers.utils.torch_utils": {"randn_tensor": None}, "diffusers.video_processor": {"VideoProcessor": None}, "decord": {"VideoReader": None},
        f"{package}.modules": dict.fromkeys(("get_text_encoder", "get_transformer", "get_vae")), f"{package}.scheduler": {},
        f"{package}.scheduler.fm_solvers_unipc": {"FlowUniPCMultistepScheduler": None},
    }  # fmt: skip
    pipeline = imported(root, f"{package}.pipelines.diffusion_forcing_pipeline", {name: module(name, **held) for name, held in names.items()})
    template = torch.tensor([timestep(sigma) for sigma in flow_sigmas(LEVELS)[:-1]])
    frames = GROUP * GROUPS
    return pipeline.DiffusionForcingPipeline.generate_timestep_matrix(None, frames, template, frames, LAG, 0, GROUP)[:3]


def released_groups(
    network: Any, root: Path, noise: Tensor, texts: Tensor, before_last: Callable[[Any, int], None] = lambda network, group: None
) -> tuple[Tensor, Made]:
    """A film by Euler; which tokens of which group went through the blocks of the conditional branch, by group and step. `before_last`: called before
    a group's last step."""
    computed: Made = {}
    counts, tokens = [0] * GROUPS, GROUP * noise.shape[3] * noise.shape[4] // 4
    block, sigmas = network.blocks[0].self_attn, flow_sigmas(LEVELS)

    def noted(function: Callable[..., Tensor], some: bool) -> Callable[..., Tensor]:
        def run(x: Tensor, first: Tensor, *args: Any, **kw: Any) -> Tensor:
            group, conditional = args[2], args[3]
            if conditional:
                computed[group, counts[group]] = torch.zeros(tokens, dtype=torch.bool).index_fill_(0, first if some else torch.arange(tokens), True)
            return function(x, first, *args, **kw)

        return run

    block.forward = noted(block.forward, False)
    if hasattr(block, "forward_selective"):
        block.forward_selective = noted(block.forward_selective, True)
    x = noise.clone()
    for times, numbers, moves in zip(*released_rows(root), strict=True):
        for group in range(GROUPS):
            if counts[group] == LEVELS - 1:
                before_last(network, group)
        conditional, unconditional = (network(x, t=times[None], context=text[None], update_mask_i=moves, fps=[1]) for text in texts)
        velocity = unconditional + SCALE * (conditional - unconditional)
        for frame in moves.nonzero().flatten().tolist():
            step = int(numbers[frame]) - 1
            x[:, :, frame] += velocity[:, :, frame] * (sigmas[step + 1] - sigmas[step])
        for group in moves.view(GROUPS, GROUP).any(1).nonzero().flatten().tolist():
            counts[group] += 1
    none = torch.zeros(tokens, dtype=torch.bool)
    return x, {(group, step): computed.get((group, step), none) for group in range(GROUPS) for step in range(LEVELS)}


class AsReleased(SkyReelsAdapter):
    """The polynomial of 1.3B, and no clean pass of finished chunks, which the released code does not have. It notes which tokens it was asked for."""

    polynomial = POLYNOMIAL

    def __init__(self, network: SkyReelsV2) -> None:
        super().__init__(network)
        self.ran: Made = {}

    def forward(self, call: Call, attend: Attend) -> tuple[Tensor, Tensor]:
        tokens = call.chunk.frames * self.tokens_per_frame(*call.x.shape[3:])
        if call.chunk.committing:
            return torch.zeros_like(call.x), call.x.new_zeros(len(call.x), tokens, self.width)
        self.ran[call.chunk.index, call.chunk.step] = torch.ones(tokens, dtype=torch.bool)
        return super().forward(call, attend)

    def refresh(self, call: Call, tokens: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        out = super().refresh(call, tokens, attend)
        self.ran[call.chunk.index, call.chunk.step] = torch.zeros(out[0][0, 0].numel() // 4, dtype=torch.bool).index_fill_(0, tokens, True)
        return out


def our_groups(network: Any, noise: Tensor, texts: Tensor, policy: CachePolicy) -> tuple[Tensor, Made]:
    weights = {key: value for key, value in network.state_dict().items() if "_cache_" not in key}
    loaded = load_network(weights, "released.safetensors", torch.float32, family=SKYREELS.name)
    adapter, schedule, sigmas = AsReleased(loaded), ChunkSchedule(noise.shape[2], GROUP, LEVELS, LAG), flow_sigmas(LEVELS)  # type: ignore[arg-type]
    with Session(adapter, schedule, sigmas, tuple(noise.shape[3:]), policy=policy) as session:  # type: ignore[arg-type]

        def guided(x: Tensor, chunk: Chunk) -> Tensor:
            one, other = (session.denoise(x, chunk, texts[i : i + 1], (name,)) for i, name in enumerate(("cond", "uncond")))
            return other + SCALE * (one - other)

        film = sample_chunks(Driven(guided, session), noise, schedule, sigmas, Euler())
    none = torch.zeros_like(next(iter(adapter.ran.values())))
    return film, {(group, step): adapter.ran.get((group, step), none) for group in range(GROUPS) for step in range(LEVELS)}


@quiet
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("name", "threshold"), [("flowcache-slow-exact", 0.1), ("flowcache-fast-exact", 0.15)])
def test_skyreels_chunks_are_computed_when_the_released_rule_computes_them(name: str, threshold: float, seed: int) -> None:
    root = checkout("FLOWCACHE_PATH", f"{SKYREELS_FOLDER}/generate_video_df.py") / SKYREELS_FOLDER
    network = released_network(root, "transformer_flowcache", seed)
    network.initialize_asynchronous_teacache(True, LEVELS, threshold, True, "1.3B", LEVELS)
    for branch in ("even", "odd"):
        for what, start in (("accumulated_rel_l1_distance", 0.0), ("previous_e0", None), ("previous_residual", None)):
            setattr(network, f"{what}_{branch}", [start] * GROUPS)
        setattr(network, f"skip_{branch}", [[] for _ in range(GROUPS)])
    noise, texts = torch.randn(1, 16, GROUP * GROUPS, 4, 4), torch.randn(2, 6, TEXT)
    theirs, expected = released_groups(network, root, noise, texts)
    ours, made = our_groups(network, noise, texts, preset(name))
    for index in range(GROUPS):
        assert letters(made, index, LEVELS) == letters(expected, index, LEVELS)
    assert 8 < letters(made, 0, LEVELS).count("C") < LEVELS - 8
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def due_at_the_end(network: Any, group: int) -> None:
    for branch in ("even", "odd"):
        getattr(network, f"token_accumulated_{branch}")[group].fill_(torch.inf)


@quiet
@pytest.mark.parametrize("seed", range(2))
def test_skyreels_tokens_are_refreshed_when_the_released_rule_refreshes_them(seed: int) -> None:
    """What we do otherwise is taken out: there the polynomial is not clamped, a chunk's last step is decided as any other, and branches have masks of
    their own, which are one where they read the same text."""
    root = checkout("MOTIONCACHE_PATH", "MotionCache4SkyReels-V2/vbench_sample.py") / "MotionCache4SkyReels-V2"
    network = released_network(root, "transformer_motion", seed)
    network.optimize = True
    network.set_token_cache_config(True, 0.1, 4, 6, "global")
    network.set_weight_norm_mode("max_rescale", 0.6)
    network.set_temporal_consistency_config(True, 0.5)
    network.set_min_update_ratio(0.4)
    noise, texts = torch.randn(1, 16, GROUP * GROUPS, 8, 8), torch.randn(1, 6, TEXT).expand(2, -1, -1)
    theirs, expected = released_groups(network, root, noise, texts, due_at_the_end)
    rule = PRESETS["skyreels-v2"]
    ours, made = our_groups(network, noise, texts, replace(rule, base=replace(rule.chunkwise, rescale="unclamped")))
    for place in expected:
        assert torch.equal(made[place], expected[place]), place
    assert {*letters(made, 0, LEVELS)} == {*"Crf"}
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# which tokens of history stay

HEADS, SHARED_BY, CHANNELS_OF_HEAD, GRID, FRAMES = 3, 2, 16, (3, 4), 4
EACH = GRID[0] * GRID[1]
CLEAN_CHUNKS, KEPT_CHUNKS = 3, 2


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that the released code brings to a GPU stay where they are."""
    to = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda self, where, *args, **kw: self if where == "cuda" else to(self, where, *args, **kw))


def keys_and_queries(seed: int) -> tuple[Tensor, Tensor]:
    """Keys [1, H, N, D] of the clean chunks, some alike and some not, and the queries of one chunk [1, G * H, n, D]."""
    rng = torch.Generator().manual_seed(seed)
    n = CLEAN_CHUNKS * FRAMES * EACH
    alike = torch.randn(1, HEADS, 5, CHANNELS_OF_HEAD, generator=rng)[:, :, torch.randint(5, (n,), generator=rng)]
    keys = torch.rand(1, HEADS, n, 1, generator=rng) * alike + torch.randn(1, HEADS, n, CHANNELS_OF_HEAD, generator=rng)
    return keys, 2 * torch.randn(1, HEADS * SHARED_BY, FRAMES * EACH, CHANNELS_OF_HEAD, generator=rng)


def scored(keys: Tensor, queries: Tensor, asks: Any) -> Tensor:
    """[H, N] by our policy, as published but for the queries that ask."""
    view: Any = SimpleNamespace(keys=keys, queries=queries, frame_tokens=EACH, new=FRAMES * EACH)
    return ImportanceRedundancy(queries=asks).score(view)[0]


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("asks", ["chunk", "frame"])
@pytest.mark.parametrize("whole", ["token", "frame", "chunk"])
def test_the_released_compression_of_magi_keeps_the_tokens_with_our_highest_scores(asks: str, whole: str, seed: int) -> None:
    """Head by head, as there: the score is per head here too. What one layer keeps is chosen here by the mean over its heads."""
    root = checkout("FLOWCACHE_PATH", f"{MAGI_FOLDER}/inference/pipeline/flowcache.py") / MAGI_FOLDER
    stubs = {"matplotlib": module("matplotlib"), "matplotlib.pyplot": module("matplotlib.pyplot")}
    released = imported(root, "inference.pipeline.kvcompress.kv_compressor", stubs)
    keys, queries = keys_and_queries(seed)
    kept = KEPT_CHUNKS * FRAMES * EACH
    rule = released.KVCompressor(mix_lambda=0.07, compress_strategy=whole, query_granularity=asks, score_weighting_method="no_weight")
    rule.budget = kept
    by_token = keys[0].transpose(0, 1)
    indices = rule.update_kv(by_token, queries[0].transpose(0, 1), by_token, by_token.shape[0], FRAMES, *GRID)[2][:, :, 0]
    groups = torch.arange(by_token.shape[0]) // {"token": 1, "frame": EACH, "chunk": FRAMES * EACH}[whole]
    none = torch.zeros(HEADS, by_token.shape[0], dtype=torch.bool)
    ours = select(scored(keys, queries, asks), kept, none, groups.expand(HEADS, -1), int(groups[-1]) + 1)
    assert torch.equal(ours, indices.T.sort(1).values)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("seed", range(3))
def test_the_released_compression_of_skyreels_keeps_the_tokens_with_our_highest_scores(seed: int) -> None:
    root = checkout("FLOWCACHE_PATH", f"{SKYREELS_FOLDER}/generate_video_df.py") / SKYREELS_FOLDER
    released = imported(root, "skyreels_v2_infer.modules.compression.compress_kv", {})
    keys, queries = keys_and_queries(seed)
    kept = KEPT_CHUNKS * FRAMES * EACH
    by_token = keys[0].transpose(0, 1)
    indices = released.R1KV(budget=kept).update_kv_token(by_token, queries[0].transpose(0, 1), by_token, by_token.shape[0])[2][:, :, 0]
    ours = select(scored(keys, queries, "chunk"), kept, torch.zeros(HEADS, by_token.shape[0], dtype=torch.bool))
    assert torch.equal(ours, indices.T.sort(1).values)

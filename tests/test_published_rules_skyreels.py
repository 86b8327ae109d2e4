"""The published rules for SkyReels-V2, of FlowCache (ICLR 2026) and MotionCache (arXiv 2605.01725), against their released code: both run, decision
by decision.

FLOWCACHE_PATH and MOTIONCACHE_PATH name folders of checkouts; without them the tests are skipped. The released network runs, small and of random
weights, row after row of the released schedule, in float32 where it says bfloat16, with PyTorch's attention and Euler steps. Diffusers and the one
pattern of einops are stand-ins.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowcache_core.models.adapter import Call
from flowcache_core.models.checkpoint import load_network
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
from tests.released import Torch, checkout, imported, module, sdpa
from tests.released_rules import SKYREELS_FOLDER, Made, letters

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

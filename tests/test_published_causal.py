"""Few-step causal models against the released code of Self-Forcing, Causal-Forcing, CausVid and LongLive: networks of random weights, both run.

Skipped without the folders of the checkouts (`CHECKOUTS`). What the released code imports and a processor does not have is replaced: compiled
attention by PyTorch's own in the dtype of its input (flash attention computes in bfloat16), the base classes of Diffusers by plain modules, text
encoder and tokenizer by given embeddings, helpers for CUDA memory by nothing. The released loops make caches for twelve heads and thirty layers, of
which the small networks use two and two, and count 1560 tokens a frame, here 4. Their fresh noise is that of our sampler.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.policy import Positions
from flowcache_core.kv.scores.streaming import StreamingLLM
from flowcache_core.models.attention import BlockCausal
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.causal_wan_family import CAUSAL_FORCING, CAUSVID, FRAMEWISE, LONGLIVE, SELF_FORCING
from flowcache_core.models.checkpoint import load_network_file
from flowcache_core.models.family import Family
from flowcache_core.models.wan_vae import WanVAE
from flowcache_core.run.generate import Given, Job, generate
from tests.released import checkout, importing, module, sdpa

pytestmark = pytest.mark.slow
LOOP = "pipeline/causal_inference.py"
CHECKOUTS = {
    "self-forcing": ("SELF_FORCING_PATH", LOOP),
    "causal-forcing": ("CAUSAL_FORCING_PATH", LOOP),
    "causvid": ("CAUSVID_PATH", "causvid/models/wan/causal_inference.py"),
    "longlive": ("LONGLIVE_PATH", LOOP),
}
"""Released code -> the variable that names the folder of its checkout, and a file by which it is known."""
HEADS, LAYERS, FFN, TEXT_DIM, WORDS = 2, 2, 384, 64, 512
SIDE, TOKENS = 4, 4
"""Height and width of the latents, and tokens of a latent frame."""
SEED = 3
AVERAGED = SELF_FORCING, FRAMEWISE
"""Families whose published commands have --use_ema."""
WRAPPED = "diffusers", "diffusers.configuration_utils", "diffusers.models", "diffusers.models.modeling_utils"


@dataclass(frozen=True)
class Released:
    """One checkout: its causal network, the module of its wrapper around it, and that of its loop."""

    name: str
    network: ModuleType
    wrapper: ModuleType
    loop: ModuleType
    vae: ModuleType


def stand_ins(root: Path) -> dict[str, ModuleType]:
    base = root / "causvid" / "models" / "wan" / "wan_base" if (root / "causvid").is_dir() else root / "wan"
    prefix = ".".join(base.relative_to(root).parts)
    packages = {prefix: base, f"{prefix}.modules": base / "modules", "pipeline": root / "pipeline", "utils": root / "utils"}
    if "causvid" in prefix:
        packages |= {name: root.joinpath(*name.split(".")) for name in ("causvid", "causvid.models", "causvid.models.wan")}
    helpers = "gpu", "get_cuda_free_memory_gb", "DynamicSwapInstaller", "move_model_to_device_with_memory_preservation", "log_gpu_memory"
    nothing = dict.fromkeys(helpers)
    return {
        **{name: module(name, path) for name, path in packages.items()},
        **{name: module(name) for name in WRAPPED},
        "diffusers.configuration_utils": module("diffusers.configuration_utils", ConfigMixin=object, register_to_config=lambda made: made),
        "diffusers.models.modeling_utils": module("diffusers.models.modeling_utils", ModelMixin=nn.Module),
        f"{prefix}.modules.attention": module("attention", attention=sdpa, flash_attention=sdpa),
        f"{prefix}.modules.t5": module("t5", umt5_xxl=None),
        f"{prefix}.modules.tokenizers": module("tokenizers", HuggingfaceTokenizer=None),
        "utils.memory": module("memory", **nothing),
        "demo_utils": module("demo_utils"),
        "demo_utils.memory": module("memory", **nothing),
    }


TOPS = {"wan", "utils", "pipeline", "causvid", "demo_utils", "diffusers"}
_LOADED: dict[str, Released] = {}


def released(name: str) -> Released:
    """Skips the test without a checkout."""
    root = checkout(*CHECKOUTS[name])
    pytest.importorskip("einops")
    if name not in _LOADED:
        parts = ("causvid.models.wan.causal_model", "causvid.models.wan.wan_wrapper", "causvid.models.wan.causal_inference",
                 "causvid.models.wan.wan_base.modules.vae") if name == "causvid" else \
                ("wan.modules.causal_model", "utils.wan_wrapper", "pipeline.causal_inference", "wan.modules.vae")  # fmt: skip
        with importing(root, stand_ins(root), TOPS):
            if name == "causvid":
                models: Any = sys.modules["causvid.models"]
                models.get_diffusion_wrapper = models.get_text_encoder_wrapper = models.get_vae_wrapper = None
            _LOADED[name] = Released(name, *map(importlib.import_module, parts))
    return _LOADED[name]


# both networks


def weights_of(made: nn.Module) -> dict[str, Tensor]:
    """Random ones under the names of the module, large enough that every part of the network counts."""
    rng, out = torch.Generator().manual_seed(1), {}
    for name, held in made.state_dict().items():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        out[name] = around + torch.randn(held.shape, generator=rng) * (0.05 if held.ndim > 1 else 0.02)
    return out


def wrapped(code: Released, **options: Any) -> Any:
    """The generator of the released code, small: by its own constructor, but for the files that it reads."""
    sizes = {"dim": HEADS * 128, "ffn_dim": FFN, "num_heads": HEADS, "num_layers": LAYERS, "text_dim": TEXT_DIM, "text_len": WORDS}
    wrapper: Any = code.wrapper
    for name in ("WanModel", "CausalWanModel", "CausalWanModelInfinity"):
        if kind := getattr(wrapper, name, None):
            kind.from_pretrained = partial(lambda kind, *_, **more: kind(**sizes, **more), kind)
    causal = {"is_causal": True, "timestep_shift": 5.0, **options}
    made = wrapper.CausalWanDiffusionWrapper() if code.name == "causvid" else wrapper.WanDiffusionWrapper(**causal)
    made.load_state_dict(weights_of(made))
    return made.eval().requires_grad_(False)


def ours(generator: nn.Module, family: Family, folder: Path) -> Any:
    """The same weights through a file as it is published, in the part that the published commands read; the other generator has none of them."""
    part, other = ("generator_ema", "generator") if family in AVERAGED else ("generator", "generator_ema")
    held = generator.state_dict()
    torch.save({part: held, other: {key: torch.zeros_like(weight) for key, weight in held.items()}, "step": 600}, folder / "model.pt")
    return load_network_file(folder / "model.pt", torch.float32, family=family.name)


def words() -> Tensor:
    return torch.randn(1, 9, TEXT_DIM, generator=torch.Generator().manual_seed(5))


class Words(Bundle):
    """Nine words; the released network pads them to 512 itself, ours is given what the host pads with zeros."""

    def text(self, prompt: str) -> Tensor:
        return torch.cat([words(), torch.zeros(1, WORDS - 9, TEXT_DIM)], 1)


def bundled(generator: nn.Module, family: Family, folder: Path, window: int = 0) -> Bundle:
    layout = replace(family.layout, window=window or family.layout.window)
    return Words(family, ours(generator, family, folder), nn.Identity(), layout)


def job_of(family: Family, latents: int) -> Job:
    return Job.usual(family, "a text", frames=family.frames.pixel(latents), size=8 * SIDE, seed=SEED)


# their loop


class OnProcessor:
    """`torch` of a released loop: what it makes on a GPU is made here, and its fresh noise is that of our sampler."""

    def __init__(self, steps: int) -> None:
        self.steps, self.drawn = steps, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def ones(self, *sizes: Any, device: Any = None, **settings: Any) -> Tensor:
        return torch.ones(*sizes, **settings)

    def randn_like(self, x: Tensor) -> Tensor:
        """[frames of the chunk, C, h, w]."""
        chunk, step = divmod(self.drawn, self.steps - 1)
        self.drawn += 1
        rng = torch.Generator().manual_seed(SEED + 1000 * chunk + step)
        return torch.randn(1, x.shape[1], x.shape[0], *x.shape[2:], generator=rng)[0].transpose(0, 1)


def settings_in(code: Released, file: str) -> dict[str, Any]:
    """What a published configuration says of noise levels, chunks and history."""
    text = (Path(os.environ[CHECKOUTS[code.name][0]]) / "configs" / file).read_text()
    steps = re.search(r"^denoising_step_list:\n((?:- \d+.*\n)+)", text, re.M)
    assert steps
    counts = {key: re.search(rf"^ *{key}: (\d+)", text, re.M) for key in ("num_frame_per_block", "local_attn_size", "sink_size", "context_noise")}
    warped = re.search(r"^warp_denoising_step: (true|false)", text, re.M)
    assert warped
    return {
        "denoising_step_list": [int(one) for one in re.findall(r"^- (\d+)", steps[1], re.M)],
        "warp_denoising_step": warped[1] == "true",
        **{key: int(found[1]) for key, found in counts.items() if found},
    }


def published_film(code: Released, generator: Any, settings: Mapping[str, Any], x: Tensor, given: Tensor | None = None, **changes: Any) -> Tensor:
    """Their loop from noise x [1, C, F, h, w], of which the first frames are `given` -> all latents, [1, C, F, h, w]."""
    text: Any = lambda text_prompts: {"prompt_embeds": words()}  # noqa: E731 (called by that name)
    vae, loop = SimpleNamespace(decode_to_pixel=lambda latents, **_: latents), cast(Any, code.loop)
    some = SimpleNamespace(local_attn_size=settings.get("local_attn_size", -1))
    args = SimpleNamespace(**{"model_kwargs": some, "independent_first_frame": False, "context_noise": 0, **settings, **changes})
    start, extra = 0 if given is None else given.shape[2], {}
    if code.name == "causvid":
        args.generator_name = args.model_name = "causal_wan"
        for what, made in (("diffusion", generator), ("text_encoder", text), ("vae", vae)):
            setattr(loop, f"get_{what}_wrapper", partial(lambda made, model_name: lambda: made, made))
        pipeline, start, extra = loop.InferencePipeline(args, "cpu"), 0, {"start_latents": given}
    else:
        pipeline, extra = loop.CausalInferencePipeline(args, "cpu", generator, text, vae), {} if given is None else {"initial_latent": given}
    pipeline.num_transformer_blocks, pipeline.frame_seq_length = LAYERS, TOKENS
    make = pipeline._initialize_kv_cache

    def of_few_heads(*some: Any, **named: Any) -> None:
        make(*some, **named)
        for layer in pipeline.kv_cache1:
            layer["k"], layer["v"] = (layer[part][:, :, :HEADS] for part in "kv")

    pipeline._initialize_kv_cache = of_few_heads
    loop.torch = OnProcessor(len(pipeline.denoising_step_list))
    try:
        extra = {name: latents if latents is None else latents.transpose(1, 2) for name, latents in extra.items()}
        _, film = pipeline.inference(x[:, :, start:].transpose(1, 2), ["a text"], return_latents=True, **extra)
    finally:
        loop.torch = torch
    out: Tensor = film.transpose(1, 2)
    return out


def same(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


# the network


@pytest.mark.parametrize("name", CHECKOUTS)
def test_the_network_is_the_released_one(name: str, tmp_path: Path) -> None:
    """A clean chunk, and a noisy one that looks back on it, in float64; the rotation of ours has phases in float32."""
    code = released(name)
    generator = wrapped(code).double()
    network = ours(generator, SELF_FORCING, tmp_path).double()
    x, t = torch.randn(1, 16, 6, SIDE, SIDE, dtype=torch.float64), torch.tensor([[0] * 3 + [757] * 3])
    cache: list[dict[str, Any]] = [
        {**{part: torch.zeros(1, 6 * TOKENS, HEADS, 128, dtype=torch.float64) for part in "kv"},
         **{f"{which}_end_index": torch.tensor([0]) for which in ("global", "local")}}
        for _ in range(LAYERS)
    ]  # fmt: skip
    text: list[dict[str, Any]] = [{"is_init": False} for _ in range(LAYERS)]
    theirs = []
    for frame in (0, 3):
        ends = {"current_end": (frame + 3) * TOKENS} if name == "causvid" else {}
        theirs.append(generator.model(x[:, :, frame : frame + 3], t=t[:, frame : frame + 3], context=words().double(), seq_len=32760, kv_cache=cache,
                                      crossattn_cache=text, current_start=frame * TOKENS, **ends))  # fmt: skip
    padded = torch.cat([words(), torch.zeros(1, WORDS - 9, TEXT_DIM)], 1).double()
    mine = network(x, t, network.text_kv(padded), BlockCausal([3 * TOKENS, 6 * TOKENS]))
    torch.testing.assert_close(mine, torch.cat(theirs, 2), rtol=0, atol=1e-6)
    assert (network(x, t, network.text_kv(words().double()), BlockCausal([3 * TOKENS, 6 * TOKENS])) - mine).abs().max() > 1e-3
    alone = network(x[:, :, 3:], t[:, 3:], network.text_kv(padded), BlockCausal([3 * TOKENS]), start=3)
    assert (alone - mine[:, :, 3:]).abs().max() > 1e-2


# noise levels


CONFIGS = [
    ("self-forcing", "self_forcing_dmd.yaml", SELF_FORCING),
    ("causal-forcing", "causal_forcing_dmd_chunkwise.yaml", CAUSAL_FORCING),
    ("causal-forcing", "causal_forcing_dmd_framewise.yaml", FRAMEWISE),
    ("causvid", "wan_causal_dmd.yaml", CAUSVID),
    ("longlive", "longlive_inference.yaml", LONGLIVE),
]
"""Released code, its settings, our family."""
EACH = pytest.mark.parametrize(("name", "config", "family"), CONFIGS, ids=lambda value: getattr(value, "name", value))


@EACH
def test_noise_levels_and_steps_are_the_released_ones(name: str, config: str, family: Family) -> None:
    """What the network is given, the clean latent of its prediction, and the noise that is laid on it."""
    code = released(name)
    generator, settings = wrapped(code), settings_in(code, config)
    listed = torch.tensor([step for step in settings["denoising_step_list"] if step])
    grid = torch.cat([generator.scheduler.timesteps, torch.zeros(1)])
    steps = (grid[1000 - listed] if settings["warp_denoising_step"] else listed).tolist()
    levels = family.noise.levels(len(steps), family.noise.shift)
    assert [family.noise.timestep(level) for level in levels[:-1]] == pytest.approx(steps, rel=1e-6)
    x, v, noise = (torch.randn(3, 16, SIDE, SIDE) for _ in range(3))
    for step, level in zip(steps, levels, strict=False):
        t = torch.full((3,), step)
        same(x - level * v, generator._convert_flow_pred_to_x0(v, x, t))
        same((1 - level) * x + level * noise, generator.scheduler.add_noise(x, noise, t))


# films


@EACH
def test_a_film_is_the_released_one(name: str, config: str, family: Family, tmp_path: Path) -> None:
    """Of twelve latent frames, which every one of these models sees at once."""
    code = released(name)
    generator, settings = wrapped(code), settings_in(code, config)
    assert settings["num_frame_per_block"] == family.layout.chunk_frames
    bundle, job = bundled(generator, family, tmp_path), job_of(family, 12)
    same(generate(bundle, job)[0], published_film(code, generator, settings, job.noise(bundle)))


@pytest.mark.parametrize("name", ["self-forcing", "causal-forcing"])
def test_a_film_longer_than_the_window_is_the_released_one(name: str, tmp_path: Path) -> None:
    """With as much local attention as the trained window; without any, the released cache has no room for a longer film."""
    code = released(name)
    family = SELF_FORCING if name == "self-forcing" else CAUSAL_FORCING
    settings = {"denoising_step_list": [1000, 750, 500, 250], "warp_denoising_step": True, "num_frame_per_block": 3, "local_attn_size": 21}
    generator = wrapped(code, local_attn_size=21)
    bundle, job = bundled(generator, family, tmp_path), job_of(family, 27)
    mine, _ = generate(bundle, job)
    same(mine, published_film(code, generator, settings, job.noise(bundle)))
    longer = bundled(generator, family, tmp_path, window=9)
    assert (generate(longer, job)[0] - mine)[:, :, 21:].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "positions"), [("longlive_inference.yaml", "as they are"), ("longlive_inference_infinity.yaml", "within the window")]
)
def test_a_longlive_film_with_its_sink_is_the_released_one(config: str, positions: Positions, tmp_path: Path) -> None:
    """The sink as far away as it is, or at the window's edge, as in endless films."""
    code = released("longlive")
    settings = settings_in(code, config)
    history = {key: settings[key] for key in ("local_attn_size", "sink_size")}
    generator = wrapped(code, use_infinite_attention="infinity" in config, **history)
    bundle, job = bundled(generator, LONGLIVE, tmp_path), job_of(LONGLIVE, 24)
    mine, _ = generate(bundle, job, compressor=Compressor(StreamingLLM(), 3.0, sink=3, positions=positions))
    same(mine, published_film(code, generator, settings, job.noise(bundle)))
    assert (generate(bundle, job)[0] - mine)[:, :, 12:].abs().max() > 1e-2


STARTS = [
    ("self-forcing", "self_forcing_dmd.yaml", SELF_FORCING, 3, {}),
    ("self-forcing", "self_forcing_dmd.yaml", SELF_FORCING, 6, {}),
    ("self-forcing", "self_forcing_dmd.yaml", SELF_FORCING, 1, {"independent_first_frame": True}),
    ("self-forcing", "self_forcing_dmd.yaml", SELF_FORCING, 4, {"independent_first_frame": True}),
    ("causal-forcing", "causal_forcing_dmd_framewise.yaml", FRAMEWISE, 1, {}),
    ("causal-forcing", "causal_forcing_dmd_framewise.yaml", FRAMEWISE, 2, {}),
    ("causvid", "wan_causal_dmd.yaml", CAUSVID, 3, {}),
]


@pytest.mark.parametrize(("name", "config", "family", "frames", "changes"), STARTS)
def test_a_film_from_given_frames_is_the_released_one(
    name: str, config: str, family: Family, frames: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    code = released(name)
    generator, settings = wrapped(code), settings_in(code, config)
    bundle, job = bundled(generator, family, tmp_path), job_of(family, frames + 6)
    start = torch.randn(1, 16, frames, SIDE, SIDE)
    mine, _ = generate(bundle, job, given=Given(start=start))
    same(mine, published_film(code, generator, settings, job.noise(bundle), start, **changes))


# the VAE


@pytest.mark.parametrize("name", CHECKOUTS)
def test_the_vae_is_the_released_one(name: str) -> None:
    """Latents of a film and the film of these latents: normalisation, and what convolutions remember from piece to piece."""
    code = released(name)
    wrapper, torch_vae = cast(Any, code.wrapper), cast(Any, code.vae).WanVAE_
    torch.manual_seed(2)
    small = torch_vae(dim=16, z_dim=16, num_res_blocks=2, temperal_downsample=[False, True, True])
    wrapper._video_vae = lambda pretrained_path, z_dim: small
    theirs, mine = wrapper.WanVAEWrapper(), WanVAE.from_state_dict(small.state_dict())
    latents, film = torch.randn(1, 16, 4, 2, 2), torch.rand(1, 3, 9, 16, 16) * 2 - 1
    with torch.no_grad():
        same(mine.decode(latents).clamp(-1, 1), theirs.decode_to_pixel(latents.transpose(1, 2)).transpose(1, 2))
        if name != "causvid":  # its wrapper decodes only
            same(mine.encode(film), theirs.encode_to_latent(film).transpose(1, 2))

"""SkyReels-V2 against its released code: networks of random weights, both run.

Skipped without SKYREELS_V2_PATH, the folder of a checkout. What the released code imports and a processor does not have is put in its place: the
compiled attention by PyTorch's own in the dtype of its input, the base classes of Diffusers by plain modules that remember their settings, text
encoder and tokenizer by given embeddings. Between its layers the released network rounds to bfloat16; here it is let keep float32, or rounding
would hide what is looked for. Sections of long films are compared twice: with a VAE that hands latents on unchanged, and with the released one of few
channels, which decodes the end of a section and encodes it anew.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowcache_core.models.attention import BlockCausal, bidirectional
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.checkpoint import load_network_file
from flowcache_core.models.family import ChunkLayout
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.models.wan_vae import WanVAE
from flowcache_core.run.generate import Given, Job, generate, generate_upstream
from flowcache_core.sampling.given import GivenNoise
from flowcache_core.sampling.noise import flow_sigmas, timestep
from flowcache_core.sampling.path import Path as Levels
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import UniPC, UniPCMemory
from tests.released import Torch, importing, module, sdpa

VARIABLE = "SKYREELS_V2_PATH"
PACKAGE = "skyreels_v2_infer"
DIM, FFN, LAYERS, HEADS, TEXT_DIM = 256, 384, 2, 2, 64
SIDE = 4
"""Height and width of the latents."""
FILM = 1e-4
"""How far a film may be off, as a part of its largest value: the released solver has coefficients in float32."""
PROMPT, NEGATIVE = "red circle moves right", "blurred, still"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
if not os.environ.get(VARIABLE):
    pytest.skip(f"set {VARIABLE} to the folder of a checkout of the released code", allow_module_level=True)


class Network(nn.Module):
    """In the place of the base class of Diffusers: knows the dtype of its weights."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def remembering(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that notes its arguments in `config`."""

    @functools.wraps(init)
    def noted(self: Any, *args: Any, **kw: Any) -> None:
        bound = inspect.signature(init).bind(self, *args, **kw)
        bound.apply_defaults()
        self.config = SimpleNamespace(**{name: value for name, value in bound.arguments.items() if name != "self"})
        init(self, *args, **kw)

    return noted


def stand_ins(root: Path) -> dict[str, ModuleType]:
    package = root / PACKAGE
    makers = dict.fromkeys(("get_text_encoder", "get_transformer", "get_vae", "get_image_encoder"))
    diffusers: dict[str, dict[str, Any]] = {
        "diffusers": {},
        "diffusers.configuration_utils": {"ConfigMixin": type("Config", (), {}), "register_to_config": remembering},
        "diffusers.image_processor": {"PipelineImageInput": object},
        "diffusers.loaders": {"PeftAdapterMixin": type("Other", (), {})},
        "diffusers.models": {},
        "diffusers.models.modeling_utils": {"ModelMixin": Network},
        "diffusers.schedulers": {},
        "diffusers.schedulers.scheduling_utils": {
            "KarrasDiffusionSchedulers": (),
            "SchedulerMixin": type("Scheduler", (), {}),
            "SchedulerOutput": None,
        },
        "diffusers.utils": {"deprecate": None},
        "diffusers.utils.torch_utils": {"randn_tensor": None},
        "diffusers.video_processor": {"VideoProcessor": None},
    }
    return {
        **{name: module(name, **held) for name, held in diffusers.items()},
        PACKAGE: module(PACKAGE, package),
        **{f"{PACKAGE}.{part}": module(f"{PACKAGE}.{part}", package / part) for part in ("pipelines", "scheduler")},
        f"{PACKAGE}.modules": module(f"{PACKAGE}.modules", package / "modules", **makers),
        f"{PACKAGE}.modules.attention": module("attention", flash_attention=sdpa),
        "decord": module("decord", VideoReader=None),
    }


class InFloat32(Torch):
    """`torch` with float32 under the name of bfloat16, and random numbers from `rng`."""

    def __init__(self) -> None:
        super().__init__(bfloat16=torch.float32)
        self.rng = torch.Generator()

    def randn_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.rng)


@dataclass(frozen=True)
class Released:
    transformer: ModuleType
    scheduler: ModuleType
    vae: ModuleType
    pipeline: ModuleType
    torch: InFloat32 = field(default_factory=InFloat32)


@pytest.fixture(scope="module")
def released() -> Released:
    pytest.importorskip("einops", reason="the released VAE needs einops")
    parts = ("modules.transformer", "scheduler.fm_solvers_unipc", "modules.vae", "pipelines.diffusion_forcing_pipeline")
    root = Path(os.environ[VARIABLE]).absolute()
    with importing(root, stand_ins(root), {PACKAGE, "diffusers", "decord"}):
        out = Released(*(importlib.import_module(f"{PACKAGE}.{part}") for part in parts))
    out.transformer.torch = out.pipeline.torch = out.torch  # type: ignore[attr-defined]
    out.pipeline.tqdm = lambda rows: rows  # type: ignore[attr-defined]
    return out


def randomised(network: nn.Module, seed: int) -> nn.Module:
    """Everything matters, nothing starts at zero or one."""
    rng = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        whole = 1.0 if ("norm" in name and name.endswith("weight")) or name.endswith("gamma") else 0.0
        weight.copy_(whole + torch.randn(weight.shape, generator=rng) * (0.05 if 1 < weight.ndim < 5 else 0.1))
    return network.eval().requires_grad_(False)


def network_of(released: Released, fps: bool = True) -> Any:
    sizes = {"dim": DIM, "ffn_dim": FFN, "num_heads": HEADS, "num_layers": LAYERS, "text_dim": TEXT_DIM}
    return randomised(released.transformer.WanModel(**sizes, inject_sample_info=fps), 3)


def loaded(theirs: Any, folder: Path) -> SkyReelsV2:
    """The released network's weights in two shards, as a checkpoint lies in its folder, through our loader."""
    state = {key: weight.contiguous() for key, weight in theirs.state_dict().items()}
    keys = sorted(state)
    for number, part in enumerate((keys[::2], keys[1::2]), 1):
        save_file({key: state[key] for key in part}, folder / f"model-{number:05d}-of-00002.safetensors")
    network = load_network_file(folder, torch.float32, family=SKYREELS.name, families=(SKYREELS,))
    assert isinstance(network, SkyReelsV2)
    return network


@pytest.fixture
def theirs(released: Released) -> Any:
    return network_of(released)


@pytest.fixture
def ours(theirs: Any, tmp_path: Path) -> SkyReelsV2:
    return loaded(theirs, tmp_path)


def bundle_of(network: SkyReelsV2, chunk: int = 5, window: int = 5) -> Bundle:
    return Bundle(SKYREELS, network, None, ChunkLayout(chunk, window))


def near(ours: Tensor, theirs: Tensor, part: float) -> None:
    """To `part` of the largest value."""
    assert ours.shape == theirs.shape
    error, most = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert error <= part * most, f"{error:.3g} apart, where the largest value is {most:.3g}"


@dataclass
class Latents:
    """A VAE for the released pipeline that decodes to blank frames and notes the latents; what it encodes are the last latents that it was given."""

    given: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)

    def encode(self, video: Tensor) -> Tensor:
        if self.given:
            return self.given.pop(0)
        return self.seen[-1][:, :, -((video.shape[2] - 1) // 4 + 1) :]

    def decode(self, z: Tensor) -> Tensor:
        self.seen.append(z.clone())
        return z.new_zeros(len(z), 3, 4 * z.shape[2] - 3, 8 * z.shape[3], 8 * z.shape[4])


@dataclass(frozen=True)
class Overwritten(UniPC):
    """UniPC as the released pipeline runs it: the scheduler keeps the frame that it sets out from as a view of the film, and the pipeline then
    writes the next one there. So the first correction starts from the predicted frame in the place of the one before it."""

    def step(self, x: Tensor, velocity: Tensor, number: int, path: Levels, memory: object) -> Tensor:
        out = super().step(x, velocity, number, path, memory)
        if number == 0:
            assert isinstance(memory, UniPCMemory)
            memory.x = out
        return out


def pipeline_of(released: Released, network: Any, bundle: Bundle, job: Job, noise: list[Tensor], vae: Any) -> Any:
    """`noise`: of every section. The random numbers of light noise are those of our run."""
    pipe = object.__new__(released.pipeline.DiffusionForcingPipeline)
    pipe.transformer, pipe.vae, pipe.device, pipe.offload = network, vae, torch.device("cpu"), False
    pipe.text_encoder = SimpleNamespace(to=lambda device: None, encode=bundle.text)
    pipe.scheduler = released.scheduler.FlowUniPCMultistepScheduler()
    pipe.prepare_latents = lambda *_, **__: noise.pop(0).clone()
    released.torch.rng = GivenNoise(job.addnoise, job.seed).start()
    return pipe


def film_of(
    released: Released, network: Any, bundle: Bundle, job: Job, noise: list[Tensor] | None = None, vae: Any = None, **settings: Any
) -> Tensor:
    """-> the latents that the released pipeline decodes last, [1, 16, F, h, w]."""
    vae = vae or Latents()
    pipe = pipeline_of(released, network, bundle, job, noise or [job.noise(bundle)[0]], vae)
    pipe(prompt=PROMPT, negative_prompt=NEGATIVE, height=job.size, width=job.picture[1], num_frames=job.frames, num_inference_steps=job.steps,
         shift=job.shift, guidance_scale=job.cfg, addnoise_condition=job.addnoise, ar_step=job.ar_step, fps=job.fps, **settings)  # fmt: skip
    return torch.cat(vae.seen[-1:], 2)


def job_of(frames: int, **settings: Any) -> Job:
    return Job(PROMPT, **{"frames": frames, "steps": 6, "seed": 4, "negative": NEGATIVE, "size": 8 * SIDE, "cfg": 6.0, "addnoise": 0, **settings})


def picture() -> Any:
    """An image as the pipeline takes it; what the VAE makes of it is given."""
    return SimpleNamespace(resize=lambda size: np.zeros((size[1], size[0], 3), np.uint8))


def latents(frames: int, seed: int) -> Tensor:
    return torch.randn(1, 16, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


TEXTS = torch.randn(2, 12, TEXT_DIM, generator=torch.Generator().manual_seed(5))
TIMES = torch.tensor([[0, 20, 345, 999, 999, 7]])


@pytest.mark.parametrize("fps", [16, 24])
def test_the_network_is_the_released_one(theirs: Any, ours: SkyReelsV2, fps: int) -> None:
    x = latents(6, 1)
    expected = theirs(x, t=TIMES, context=TEXTS[:1], fps=[0 if fps == 16 else 1])
    near(ours(x, TIMES, ours.text_kv(TEXTS[:1]), bidirectional, fps=fps), expected, 1e-5)


def test_the_network_without_a_frame_rate_is_the_released_one(released: Released, tmp_path: Path) -> None:
    theirs = network_of(released, fps=False)
    ours, x = loaded(theirs, tmp_path), latents(6, 1)
    near(ours(x, TIMES, ours.text_kv(TEXTS[:1]), bidirectional), theirs(x, t=TIMES, context=TEXTS[:1], fps=[1]), 1e-5)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_block_causal_attention_is_the_released_one(theirs: Any, ours: SkyReelsV2, block: int) -> None:
    theirs.set_ar_attention(block)
    x, tokens = latents(6, 1), SIDE // 2 * (SIDE // 2)
    ends = [tokens * end for end in range(block, 7, block)]
    near(ours(x, TIMES, ours.text_kv(TEXTS[:1]), BlockCausal(ends)), theirs(x, t=TIMES, context=TEXTS[:1], fps=[1]), 1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_noise_levels_and_timesteps_are_the_released_ones(released: Released, shift: float) -> None:
    """As numbers of the core and as the float32 numbers that a host hands over.

    From 98 steps on a level can lie nearer below a whole timestep than float32 can tell, and count as it.
    """
    scheduler = released.scheduler.FlowUniPCMultistepScheduler()
    for steps in range(1, 98):
        scheduler.set_timesteps(steps, device="cpu", shift=shift)
        levels = flow_sigmas(steps, shift)
        torch.testing.assert_close(torch.tensor(levels), scheduler.sigmas, rtol=1e-6, atol=0)
        for told in (levels, torch.tensor(levels).tolist()):
            assert [timestep(level) for level in told[:-1]] == scheduler.timesteps.tolist(), f"{steps} steps"


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 30, 50])
@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_unipc_is_the_released_solver(released: Released, steps: int, shift: float) -> None:
    """Whose coefficients are float32: the log of one minus the first noise level keeps three or four digits there."""
    scheduler = released.scheduler.FlowUniPCMultistepScheduler(num_train_timesteps=1000, shift=1, use_dynamic_shifting=False)
    scheduler.set_timesteps(steps, device="cpu", shift=shift)
    solver, path = UniPC(), Levels.whole(flow_sigmas(steps, shift))
    memory, target = solver.start(torch.Generator()), latents(1, 8)[0, :, 0]
    mine = theirs = latents(1, 7)[0, :, 0]

    def velocity(x: Tensor, sigma: float) -> Tensor:
        return 1.2 * x - target * (1 + sigma) + torch.sin(2 * x)

    for number, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(velocity(theirs, path.sigmas[number]), t, theirs, return_dict=False)[0]
        mine = solver.step(mine, velocity(mine, path.sigmas[number]), number, path, memory)
    near(mine, theirs, 1e-4)


MATRICES = [(25, 5, 0, 0), (25, 5, 5, 0), (25, 5, 7, 5), (25, 5, 0, 5), (25, 1, 0, 1), (25, 1, 0, 5), (9, 1, 3, 2), (6, 2, 30, 2), (12, 3, 1, 6)]


@pytest.mark.parametrize(("frames", "block", "ar_step", "prefix"), MATRICES)
def test_the_schedule_is_the_released_matrix(released: Released, frames: int, block: int, ar_step: int, prefix: int) -> None:
    """Row by row: where each frame stands, and which move."""
    pipe = object.__new__(released.pipeline.DiffusionForcingPipeline)
    times = torch.tensor([timestep(level) for level in flow_sigmas(30)[:-1]])
    matrix, index, moves, _ = pipe.generate_timestep_matrix(frames, times, frames, ar_step, prefix, block)
    schedule = ChunkSchedule(frames, block, 30, ar_step, None, prefix)
    size = [schedule.span(k)[1] for k in range(schedule.chunks)]
    assert len(schedule.rows) == len(matrix)
    for row, ts, at, moving in zip(schedule.rows, matrix.tolist(), index.tolist(), moves.tolist(), strict=True):
        mine = [place for place, count in zip(row.indices, size, strict=True) for _ in range(count)]
        active = {chunk.index for chunk in row.active}
        assert mine == at
        assert [k in active for k, count in enumerate(size) for _ in range(count)] == moving
        assert [[999, *times.tolist(), 0][place] for place in mine] == ts


@pytest.mark.parametrize(
    "settings", [{"ar_step": 0}, {"ar_step": 3}, {"ar_step": 0, "cfg": 1.0}, {"ar_step": 0, "solver": "unipc", "fps": 16, "shift": 5.0}]
)
def test_a_film_from_a_prompt_is_the_released_one(released: Released, theirs: Any, ours: SkyReelsV2, settings: dict[str, Any]) -> None:
    """Synchronous, and asynchronous in chunks."""
    job, bundle = job_of(37, **settings), bundle_of(ours)
    near(
        generate_upstream(bundle, job, integrator=Overwritten())[0],
        film_of(released, theirs, bundle, job, causal_block_size=5 if job.ar_step else 1),
        FILM,
    )


@pytest.mark.parametrize("addnoise", [0, 20])
def test_a_film_from_an_image_is_the_released_one(released: Released, theirs: Any, ours: SkyReelsV2, addnoise: int) -> None:
    job, bundle, first = job_of(37, ar_step=0, addnoise=addnoise), bundle_of(ours), latents(1, 2)
    expected = film_of(released, theirs, bundle, job, vae=Latents([first]), image=picture())
    near(generate_upstream(bundle, job, given=Given(start=first), integrator=Overwritten())[0], expected, FILM)


def test_a_film_between_two_images_is_the_released_one_with_the_last_behind_it(released: Released, theirs: Any, ours: SkyReelsV2) -> None:
    """The released pipeline lays the last image behind the film and cuts it off before decoding: our film is longer by its latent frame."""
    job, bundle, first, last = job_of(33, ar_step=0, addnoise=20), bundle_of(ours), latents(1, 2), latents(1, 3)
    longer = job_of(37, ar_step=0, addnoise=20)
    expected = film_of(released, theirs, bundle, job, [longer.noise(bundle)[0, :, :-1]], Latents([first, last]), image=picture(), end_image=picture())
    mine, _ = generate_upstream(bundle, longer, given=Given(start=first, end=last), integrator=Overwritten())
    near(mine[:, :, :-1], expected, FILM)
    assert torch.equal(mine[:, :, -1:], last)


@pytest.mark.parametrize(("frames", "ar_step", "addnoise"), [(77, 0, 20), (97, 0, 0), (97, 3, 20)])
def test_a_long_film_is_the_released_one_section_by_section(
    released: Released, theirs: Any, ours: SkyReelsV2, frames: int, ar_step: int, addnoise: int
) -> None:
    """Sections of 10 latent frames that share 5, but for the VAE between them."""
    job, bundle = job_of(frames, ar_step=ar_step, addnoise=addnoise), bundle_of(ours, 5, 2)
    sections, vae, noise = job.sections(bundle), Latents(), job.noise(bundle)[0]
    film_of(released, theirs, bundle, job, [noise[:, one.start : one.end] for one in sections], vae, base_num_frames=37, overlap_history=17,
            causal_block_size=5 if ar_step else 1)  # fmt: skip
    expected = torch.cat([part[:, :, 5 * (number > 0) :] for number, part in enumerate(vae.seen)], 2)
    near(generate_upstream(bundle, job, integrator=Overwritten())[0], expected, FILM)


def test_a_film_with_block_causal_attention_is_the_released_one(released: Released, theirs: Any, ours: SkyReelsV2) -> None:
    """Ours chunk by chunk against a KV cache, theirs with all chunks in every row."""
    job, bundle = job_of(57, ar_step=3), bundle_of(ours, 5, 5)
    theirs.set_ar_attention(5)
    near(generate(bundle, job, integrator=Overwritten())[0], film_of(released, theirs, bundle, job), FILM)


def test_without_overwriting_the_released_film_is_ours(released: Released, theirs: Any, ours: SkyReelsV2, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released scheduler is handed copies of the frames: then UniPC is UniPC from the first step on."""
    kind, job, bundle = released.scheduler.FlowUniPCMultistepScheduler, job_of(37, ar_step=3), bundle_of(ours)
    overwritten, step = film_of(released, theirs, bundle, job, causal_block_size=5), kind.step
    monkeypatch.setattr(kind, "step", lambda self, velocity, t, x, **kw: step(self, velocity, t, x.clone(), **kw))
    mine = generate_upstream(bundle, job)[0]
    near(mine, film_of(released, theirs, bundle, job, causal_block_size=5), FILM)
    assert float((mine - overwritten).abs().max()) > 100 * FILM * float(mine.abs().max())


@dataclass(frozen=True)
class Vaes:
    """The released VAE and ours, of the same weights."""

    theirs: Any
    ours: WanVAE
    seen: list[Tensor] = field(default_factory=list)

    def encode(self, film: Tensor) -> Tensor:
        return self.theirs.encode(film)  # type: ignore[no-any-return]

    def decode(self, z: Tensor) -> Tensor:
        self.seen.append(z.clone())
        return self.theirs.decode(z)  # type: ignore[no-any-return]


@pytest.fixture
def vaes(released: Released, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Vaes:
    """Of 8 channels for 96."""
    state = randomised(released.vae.WanVAE_(dim=8, z_dim=16, temperal_downsample=[False, True, True]), 6).state_dict()
    torch.save(state, tmp_path / "vae.pth")
    monkeypatch.setattr(released.vae, "_video_vae", functools.partial(released.vae._video_vae, dim=8))
    return Vaes(released.vae.WanVAE(str(tmp_path / "vae.pth")), WanVAE.from_state_dict(state))


def film(frames: int) -> Tensor:
    return torch.rand(1, 3, frames, 8 * SIDE, 8 * SIDE, generator=torch.Generator().manual_seed(9)) * 2 - 1


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_the_vae_encodes_as_the_released_one(vaes: Vaes, frames: int) -> None:
    near(vaes.ours.encode(film(frames)), vaes.theirs.encode(film(frames)), 1e-5)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_vae_decodes_as_the_released_one(vaes: Vaes, frames: int) -> None:
    """In one call, and latent frame by latent frame."""
    z, past = latents(frames, 10), dict[nn.Module, Tensor]()
    expected = vaes.theirs.decode(z)
    near(vaes.ours.decode(z).clamp(-1, 1), expected, 1e-5)
    near(torch.cat([vaes.ours.decode(one, past) for one in z.split(1, 2)], 2).clamp(-1, 1), expected, 1e-5)


def test_a_long_film_with_its_joints_encoded_anew_is_the_released_one(released: Released, theirs: Any, ours: SkyReelsV2, vaes: Vaes) -> None:
    """The released pipeline decodes each section and encodes its last frames for the next; ours does so where each is a film from a clip."""
    first, bundle = job_of(37, ar_step=0, steps=4), bundle_of(ours)
    second = replace(first, seed=5)
    noise = [job.noise(bundle)[0] for job in (first, second)]
    film_of(released, theirs, bundle, replace(first, frames=57), noise, vaes, base_num_frames=37, overlap_history=17, causal_block_size=1)
    start, _ = generate_upstream(bundle, first, integrator=Overwritten())
    joint = vaes.ours.encode(vaes.ours.decode(start)[:, :, -17:].clamp(-1, 1))
    end, _ = generate_upstream(bundle, second, given=Given(start=joint), integrator=Overwritten())
    near(torch.cat([start, end], 2), torch.cat(vaes.seen, 2), FILM)


def test_a_clip_goes_on_as_in_the_released_pipeline(released: Released, theirs: Any, ours: SkyReelsV2, vaes: Vaes) -> None:
    job, bundle, clip = job_of(37, ar_step=0, steps=4, addnoise=20), bundle_of(ours), film(20)
    pipe = pipeline_of(released, theirs, bundle, job, [job.noise(bundle)[0]], vaes)
    pipe.get_video_as_tensor = lambda path, width, height: (clip[0].transpose(0, 1) + 1) * (255 / 2)
    pipe.extend_video(prompt=PROMPT, negative_prompt=NEGATIVE, prefix_video_path="", height=job.size, width=job.size, num_frames=job.frames,
                      num_inference_steps=job.steps, shift=job.shift, guidance_scale=job.cfg, overlap_history=17, addnoise_condition=job.addnoise,
                      base_num_frames=37, ar_step=0, causal_block_size=1, fps=job.fps)  # fmt: skip
    given = Given(start=vaes.ours.encode(clip[:, :, -17:]))
    near(generate_upstream(bundle, job, given=given, integrator=Overwritten())[0], vaes.seen[-1], FILM)


def test_an_image_that_fills_no_chunk_is_kept_where_the_released_pipeline_makes_it_anew(released: Released, theirs: Any, ours: SkyReelsV2) -> None:
    """Asynchronous in chunks, a single given frame counts there as not yet begun, and so do the other frames of its chunk."""
    job, bundle, first = job_of(37, ar_step=3, steps=4), bundle_of(ours), latents(1, 2)
    expected = film_of(released, theirs, bundle, job, vae=Latents([first]), image=picture(), causal_block_size=5)
    assert not torch.allclose(expected[:, :, :1], first, atol=0.1)
    assert torch.equal(generate_upstream(bundle, job, given=Given(start=first))[0][:, :, :1], first)

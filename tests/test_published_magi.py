"""MAGI-1 beside its released code: both run small networks of the same random weights in float32, and make the same numbers.

`MAGI_PATH` names a checkout of it. What stands in for parts that a processor has not is in `released_magi.py`. Three things are set apart, since the
documentation names them as different: the two rows that say whether text is left out are equal in films of base models, sines of times are those
of the released code (in float32), and pieces of a film are compared where they are one tile, or tiles without pixels in common.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowcache_core.models import magi, magi_vae
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.checkpoint import load_network_file
from flowcache_core.models.family import Bundled, Family
from flowcache_core.models.magi_adapter import RANGES, MagiAdapter
from flowcache_core.models.magi_family import COMMIT, MAGI, MAGI_DISTILLED, STAGES, MagiNoise, ThreeBranches
from flowcache_core.models.magi_text import TRAITS, SpecialTokens, prompt_text, read_special_tokens
from flowcache_core.models.magi_vae import LATENT_SCALE, MagiVAE
from flowcache_core.run.generate import Given, Job, generate
from flowcache_core.sampling.chunk import Chunk
from tests.released_magi import CHECKOUT, NEEDS_RELEASED, TEXT_DIM, Released, write_special_tokens
from tests.toy_family import no_vae

pytestmark = NEEDS_RELEASED

SIZES: dict[str, dict[str, Any]] = {
    "4.5B": {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 2, "num_query_groups": 1},
    "24B": {"num_layers": 3, "hidden_size": 128, "ffn_hidden_size": 80, "num_attention_heads": 4, "num_query_groups": 2},
}
SETTINGS = [f"{size}/{size}_{kind}_config.json" for size in SIZES for kind in ("base", "distill", "distill_quant")]
WORDS, PADDED, HEIGHT, WIDTH = 5, 800, 32, 48
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Released:
    pytest.importorskip("einops", reason="the released code of MAGI-1 needs einops")
    assert CHECKOUT is not None
    return Released(Path(CHECKOUT), write_special_tokens(tmp_path_factory.mktemp("tokens") / "special_tokens.npz"))


@pytest.fixture(scope="module")
def special(released: Released) -> SpecialTokens:
    return read_special_tokens(released.special_tokens)


@pytest.fixture
def their_sines(released: Released, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are at most 1 and step lengths at most 32: in float32 the sines of 32,000 radians are off by 0.001."""
    embedding = released.dit_module.TimestepEmbedder.timestep_embedding
    monkeypatch.setattr(magi, "sinusoid", lambda t: embedding(t.float().flatten() / 1000, 256, timestep_rescale_factor=1000).view(*t.shape, 256))


def config_of(released: Released, size: str, kind: str) -> Any:
    """Its settings as published, with the sizes of a small network, on one device."""
    config = released.common.MagiConfig.from_json(str(released.checkout / f"example/{size}/{size}_{kind}_config.json"))
    small = {**SIZES[size], "kv_channels": 32, "caption_channels": TEXT_DIM, "params_dtype": torch.float32}
    one_device = {"cp_strategy": "none", "cp_size": 1, "kv_offload": False}
    for part, changes in ((config.model_config, small), (config.engine_config, one_device)):
        for name, value in changes.items():
            setattr(part, name, value)
    return config


def networks(released: Released, size: str, kind: str, folder: Path, one_flag: bool = False) -> tuple[Any, magi.Magi, Family]:
    """Theirs, and ours from the file of its weights. `one_flag`: whether text is left out is not told."""
    rng, family = torch.Generator().manual_seed(4), MAGI if kind == "base" else MAGI_DISTILLED
    with released.running():
        theirs = released.dit_model.VideoDiTModel(config_of(released, size, kind)).eval()
        for name, weight in theirs.named_parameters():
            draw = torch.randn(weight.shape, generator=rng)
            if name == "rope.bands":
                weight.mul_(1 + 0.1 * draw)
            elif name.endswith("scale"):
                weight.copy_(torch.ones(()) * 0.03 if "weight" in name else 0.5 + draw.abs() if "smooth" in name else torch.ones(()) * 0.7)
            elif weight.dtype == FP8:
                weight.copy_(9 * draw)
            else:
                weight.copy_(draw * (0.5 if "norm" in name else 0.2))
        if one_flag:
            theirs.y_embedder.null_caption_embedding[-1] = theirs.y_embedder.null_caption_embedding[-2]
        save_file({name: weight.clone().contiguous() for name, weight in theirs.state_dict().items()}, folder / "model.safetensors")
    ours = load_network_file(folder, torch.float32, family=family.name)
    assert isinstance(ours, magi.Magi)
    return theirs, ours, family


def apart(ours: Tensor, theirs: Tensor) -> float:
    """How far they are apart, as a part of their own size."""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def prompt() -> tuple[Tensor, Tensor]:
    """Embeddings [1, 800, channels] whose padding is no zeros, and their mask."""
    embeddings = torch.randn(1, PADDED, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    return embeddings, (torch.arange(PADDED) < WORDS).float()[None]


# network


@torch.inference_mode()
@pytest.mark.parametrize("dropped", [False, True], ids=["text", "null"])
@pytest.mark.parametrize(("size", "kind"), [("4.5B", "base"), ("24B", "base"), ("4.5B", "distill"), ("24B", "distill")])
@pytest.mark.usefixtures("their_sines")
def test_a_network_predicts_the_same_velocity(released: Released, size: str, kind: str, dropped: bool, tmp_path: Path) -> None:
    theirs, ours, _ = networks(released, size, kind, tmp_path)
    x, (text, mask) = torch.randn(1, 16, 6, 4, 6, generator=torch.Generator().manual_seed(2)), prompt()
    grid, tokens = (6, 2, 3), 36
    with released.running():
        said = theirs(
            x, torch.tensor([[0.1761]]), text[:, None], torch.tensor([dropped]), mask[:, None], torch.tensor([[0, tokens]], dtype=torch.int32),
            range_num=1, denoising_range_num=1, slice_point=0, fwd_extra_1st_chunk=False, num_steps=12, distill_interval=torch.tensor(2.0),
        )  # fmt: skip
    condition = ours.condition(torch.tensor([0.1761]), (dropped,), 1, 4.0 if kind == "distill" else None, torch.float32)
    kv, rope = ours.text_kv(text[:, :WORDS]), magi.rope_table(ours.rope.bands, 0, *grid, "cpu")
    out = ours.stack(ours.embed(x), condition, [lambda layer: kv[layer]], rope, lambda layer, q, k, v, _: magi.attention(q, k, v))
    assert apart(-ours.velocity(out, grid), said) < 3e-6


@torch.inference_mode()
def test_sines_differ_by_the_rounding_of_float32_alone(released: Released) -> None:
    for time, off in ((0.9999, 1e-4), (4.0, 5e-4), (32.0, 3e-3)):
        theirs = released.dit_module.TimestepEmbedder.timestep_embedding(torch.tensor([time]), 256, timestep_rescale_factor=1000)
        assert float((magi.sinusoid(torch.tensor([time]) * 1000) - theirs).abs().max()) < off


# settings and noise levels


@pytest.mark.parametrize("steps", [64, 32, 16, 8, 12])
def test_times_and_lengths_of_steps_are_the_same(released: Released, steps: int) -> None:
    with released.running():
        times = released.video_generate.init_t({}, steps, "cpu", shortcut_mode="8,16,16")
        lengths = released.video_generate.init_intervel(steps, "cpu", shortcut_mode="8,16,16")
    torch.testing.assert_close(1 - torch.tensor(MagiNoise().levels(steps, 3.0)), times, rtol=0, atol=2e-7)
    told = [4 / length.item() * 2 if steps == 12 else steps / 2 for length in lengths]
    adapter = MagiAdapter(SimpleConfig(), distilled=True)  # type: ignore[arg-type]
    assert [adapter.step_length(Chunk(0, 0, 6, step, steps)) for step in range(steps)] == told


class SimpleConfig:
    """As much of a network as an adapter looks at."""

    dtype, config = torch.float32, magi.MagiConfig(64, 96, 1, 1)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_the_published_ones(released: Released, name: str) -> None:
    settings = json.loads((released.checkout / "example" / name).read_text())
    run, engine = settings["runtime_config"], settings["engine_config"]
    assert (tuple(run["noise2clean_kvrange"]), run["clean_chunk_kvrange"], run["clean_t"]) == (RANGES, 1, 1 - COMMIT)
    assert (run["window_size"], run["chunk_width"], run["scale_factor"]) == (STAGES, MAGI.layout.chunk_frames, LATENT_SCALE)
    assert (engine["shortcut_mode"], engine["distill_nearly_clean_chunk_threshold"]) == ("8,16,16", pytest.approx(0.3))
    assert settings["model_config"]["layernorm_epsilon"] == magi.EPS
    assert (run["cfg_number"] == 1) is engine["distill"] is ("distill" in name)


def test_guidance_weighs_the_branches_the_same_at_every_step(released: Released, tmp_path: Path) -> None:
    theirs, *_ = networks(released, "4.5B", "base", tmp_path)
    run, guidance = theirs.runtime_config, ThreeBranches()
    scales = (torch.tensor(one) for one in (run.cfg_t_range, run.prev_chunk_scales, run.text_scales))
    at, before, words = scales
    for level in MagiNoise().levels(64, 3.0)[:-1]:
        with released.running():
            p, w = theirs.get_cfg_scale(torch.tensor(1 - level), at, before, words)
        parts = torch.eye(3)
        torch.testing.assert_close(guidance.combine(list(parts), 7.5, level), w * parts[0] + (p - w) * parts[1] + (1 - p) * parts[2])


# text


@pytest.mark.parametrize("traits", [("hq",), (), ("static", "border", "hq", "2d"), ("dynamic", "3d")])
def test_learned_tokens_stand_in_front_in_the_same_order(released: Released, special: SpecialTokens, traits: tuple[str, ...]) -> None:
    names = {"static": "STATIC", "dynamic": "DYNAMIC", "border": "BORDERNESS", "hq": "HQ", "3d": "THREE_D_MODEL", "2d": "TWO_D_ANIME"}
    assert names.keys() == TRAITS.keys()
    (text, mask), chunks = prompt(), 10
    with released.running(**{f"PAD_{name}": str(int(trait in traits)) for trait, name in names.items()}):
        keys = released.prompt_process.get_special_token_keys()
        theirs, read = released.prompt_process.pad_special_token(keys, text[:, None].repeat(1, chunks, 1, 1), mask[:, None].repeat(1, chunks, 1))
    ours = prompt_text(text, special, traits, mask)
    for index in range(chunks):
        wanted = theirs[0, index][read[0, index].bool()]
        assert torch.equal(special.text_of(ours, Chunk(index, 6 * index, 6, 0, 8), chunks)[0], wanted)


def test_the_released_file_of_learned_tokens_is_read(released: Released) -> None:
    tokens = read_special_tokens(released.checkout / "example/assets/special_tokens.npz")
    assert (tokens.channels, tokens.durations.shape, tokens.others.shape) == (4096, (8, 4096), (100, 4096))


# films


class Noised(Job):
    """A job with noise of its own."""

    def noise(self, bundle: Bundle) -> Tensor:
        return torch.randn(self.noise_shape(bundle), generator=torch.Generator().manual_seed(self.seed))


def their_film(released: Released, network: Any, noise: Tensor, steps: int, prefix: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The latents of all frames after the last step, and what is handed on chunk by chunk."""
    (text, mask), given = prompt(), 0 if prefix is None else prefix.shape[2]
    changes = {"num_frames": 4 * (noise.shape[2] - given), "video_size_h": HEIGHT, "video_size_w": WIDTH, "num_steps": steps}
    for name, value in changes.items():
        setattr(network.runtime_config, name, value)
    with released.running():
        inputs = released.video_generate.extract_feature_for_inference(network, prefix, text[:, None], mask)
        transport = released.video_generate.SampleTransport(network, [inputs], "cpu")
        assert transport.xs[0][:1].shape == noise.shape
        transport.xs[0] = torch.cat([noise, noise])
        chunks = [chunk.clone() for _, _, chunk in transport.walk()]
    return transport.xs[0][:1], chunks


def our_film(network: magi.Magi, family: Family, special: SpecialTokens, noise: Tensor, steps: int, prefix: Tensor | None) -> Tensor:
    text, mask = prompt()
    words = prompt_text(text, special, ("hq",), mask)
    family = replace(family, bundled=Bundled("tiny", "tiny", no_vae, lambda prompt, width: words))
    settings = {"frames": 4 * noise.shape[2], "steps": steps, "size": HEIGHT, "width": WIDTH, "cfg": family.published.scale or 1.0}
    job = Noised(**vars(Job.usual(family, "", **settings)) | {"seed": SEED})
    adapter = MagiAdapter(network, distilled=family.name == MAGI_DISTILLED.name, durations=special.durations)
    film, _ = generate(Bundle(family, network, nn.Identity(), family.layout), job, adapter=lambda _, levels: adapter, given=Given(start=prefix))
    return film


SEED = 11
FILMS = [
    pytest.param("4.5B", "base", 8, 3, 0, id="base"),
    pytest.param("24B", "base", 8, 2, 0, id="base-24B"),
    pytest.param("4.5B", "distill", 16, 2, 0, id="distilled"),
    pytest.param("24B", "distill", 12, 3, 0, id="distilled-24B-shortcut"),
    pytest.param("4.5B", "distill", 8, 8, 0, id="distilled-long"),
    pytest.param("4.5B", "base", 8, 2, 1, id="base-image"),
    pytest.param("4.5B", "distill", 8, 2, 1, id="distilled-image"),
    pytest.param("4.5B", "base", 8, 4, 8, id="base-clip"),
    pytest.param("4.5B", "distill", 8, 5, 13, id="distilled-clip"),
    pytest.param("4.5B", "distill_quant", 8, 2, 0, id="distilled-fp8"),
]


@pytest.mark.parametrize(("size", "kind", "steps", "chunks", "given"), FILMS)
@pytest.mark.usefixtures("their_sines")
def test_a_film_is_the_same(
    released: Released, special: SpecialTokens, size: str, kind: str, steps: int, chunks: int, given: int, tmp_path: Path
) -> None:
    """As published: prompt with learned tokens, guidance, clean passes, ranges of history; from a prompt, an image or a clip.

    The released code in float32 is itself up to 1.2e-5 from our film in float64.
    """
    theirs, ours, family = networks(released, size, kind, tmp_path, one_flag=kind == "base")
    rng = torch.Generator().manual_seed(SEED)
    noise = torch.randn(1, 16, 6 * chunks, HEIGHT // 8, WIDTH // 8, generator=rng)
    prefix = torch.randn(1, 16, given, HEIGHT // 8, WIDTH // 8, generator=rng) if given else None
    wanted, handed_on = their_film(released, theirs, noise, steps, prefix)
    film = our_film(ours, family, special, noise, steps, prefix)
    for chunk in range(given // 6, chunks):
        own = slice(max(given, 6 * chunk), 6 * chunk + 6)
        assert apart(film[:, :, own], wanted[:, :, own]) < 2e-5, f"chunk {chunk}"
    assert torch.equal(torch.cat(handed_on, 2), wanted[:, :, 0 if given == 1 else given :])


# VAE


LAYOUT = {
    "video_size": 64, "video_length": 16, "patch_size": 8, "patch_length": 4, "in_chans": 3, "z_chans": 16, "double_z": True, "embed_dim": 256,
    "depth": 2, "num_heads": 4, "mlp_ratio": 0.25, "qkv_bias": True, "with_cls_token": True, "norm_code": False, "ln_in_attn": True,
    "conv_last_layer": True, "use_rope": False, "use_final_proj": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def vaes(released: Released) -> Iterator[tuple[Any, MagiVAE]]:
    rng = torch.Generator().manual_seed(3)
    with released.running():
        theirs = released.vae_model.ViTVAE(LAYOUT).eval()
        for name, weight in theirs.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=rng) * (0.3 if "norm" in name or "pos" in name else 0.06))
        theirs.encode = lambda film, encode=theirs.encode: encode(film, sample_posterior=False)
        weights = {name: weight.clone() for name, weight in theirs.state_dict().items()}
        yield theirs, MagiVAE.from_state_dict(weights)


@pytest.mark.parametrize("shape", [(16, 64, 64), (12, 64, 96), (1, 48, 64)], ids=["whole grid", "smaller", "image"])
def test_the_vae_makes_the_same_latents_and_frames(released: Released, vaes: tuple[Any, MagiVAE], shape: Sequence[int]) -> None:
    theirs, ours = vaes
    assert {theirs.encoder.norm.eps, theirs.encoder.blocks[0].norm2.eps, theirs.decoder.blocks[1].attn.qkv_norm.eps} == {magi_vae.EPS}
    film = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with released.running():
        latents = theirs.encode(film)
        frames = theirs.decode(latents)
        assert apart(ours.encode(film, None), latents * LATENT_SCALE) < 2e-6
        assert apart(ours.decode(latents * LATENT_SCALE, None)[:, :, : frames.shape[2]], frames) < 2e-6


def test_the_vae_goes_through_a_film_in_the_same_pieces_of_twelve_frames(released: Released, vaes: tuple[Any, MagiVAE]) -> None:
    theirs, ours = vaes
    film = torch.rand(1, 3, 48, 64, 96, generator=torch.Generator().manual_seed(6)) * 2 - 1
    with released.running():
        latents = theirs.tiled_encode_3d(film, tile_sample_min_length=12, allow_spatial_tiling=True)
        frames = [theirs.tiled_decode_3d(chunk, tile_sample_min_length=12, allow_spatial_tiling=True) for chunk in latents.split(6, 2)]
        assert apart(ours.encode(film), latents * LATENT_SCALE) < 2e-6
        assert apart(ours.decode(latents * LATENT_SCALE), torch.cat(frames, 2)) < 2e-6

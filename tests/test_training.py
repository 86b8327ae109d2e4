"""Training: a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flowcache_core.models.bundle import files_of
from flowcache_core.models.magi_family import MAGI
from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.models.wan_vae import LATENT_CHANNELS, WanVAE
from flowcache_core.training import dit, loop, vae
from flowcache_core.training.__main__ import main
from flowcache_core.training.basis import BASIS, basis_of, fit
from flowcache_core.training.clips import FIRST, POOL, Beginning, Clips, beginning_at, standing_out
from flowcache_core.training.dit import BEGINNINGS, CHUNK, CHUNKS, FINISHED, LATENTS, draw_levels, first_chunk, late_scene
from flowcache_core.training.evaluate import vae_of
from flowcache_core.training.loop import USUAL, Loop, TrainOptions, cosine, optimisers
from flowcache_core.training.muon import orthogonalise
from flowcache_core.training.preview import cells
from flowcache_core.training.recipes import RECIPES
from flowcache_core.training.scenes import HELD_OUT, Sprite, make_scene, render
from flowcache_core.training.vae import crops, initialise

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype")
"""Of a norm under autocast, once a process."""


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.inner(x)))
        return out


def train(path: Path, total: int, stop_at: int = -1, options: TrainOptions = USUAL) -> Loop[Tiny]:
    torch.manual_seed(0)
    net = Tiny()
    trained = Loop(net, path, total, optimisers(net, 1e-2, 1e-2), decay=0.9, save_every=3)

    def loss_of(step: int) -> Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 6)
        return (net(x) - x[:, :1]).square().mean()

    with torch.enable_grad():
        trained.run(loss_of, net.parameters(), options=options)
    return trained


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight = train(tmp_path / "straight.pt", 6)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped.pt", 6, stop_at=4)
    resumed = train(tmp_path / "stopped.pt", 6)
    assert resumed.step == 6
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
        assert torch.equal(straight.average[name], resumed.average[name]), name


def test_a_run_ends_at_a_step_or_with_its_time_and_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = train(tmp_path / "straight.pt", 6)
    assert train(tmp_path / "run.pt", 6, options=TrainOptions(until=2)).step == 2
    clock = iter((100.0, 119.0, 120.0))
    with monkeypatch.context() as minutes:
        minutes.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        assert train(tmp_path / "run.pt", 6, options=TrainOptions(minutes=2, began=0.0)).step == 4
    whole = train(tmp_path / "run.pt", 6)
    assert all(torch.equal(value, whole.average[name]) for name, value in straight.average.items())


@pytest.mark.parametrize(
    ("made", "said"), [(lambda: TrainOptions(minutes=0), "0 minutes were asked for"), (lambda: TrainOptions(clips=9), "9 clips were")]
)
def test_what_is_no_training_is_refused(made: Callable[[], TrainOptions], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made()


def test_a_larger_pool_grows_faster_from_the_same_start() -> None:
    basis = fit(1, lambda seed: make_scene(seed, 5, 16))
    usual, large = (Clips(basis, lambda seed: make_scene(seed, 5, 16), 2, every=2, most=most) for most in (POOL, 4 * POOL))
    assert [usual.pool(step) for step in (0, 1, 2, 3, 10**6)] == [FIRST, FIRST, FIRST + 1, FIRST + 1, POOL]
    assert [large.pool(step) for step in (0, 1, 2, 3, 10**6)] == [FIRST, FIRST + 2, FIRST + 4, FIRST + 6, 4 * POOL]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))])
def test_the_network_learns_where_it_is_put_and_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    basis = fit(3, lambda seed: make_scene(seed, 9, 64))
    monkeypatch.setattr(dit, "CONFIG", SkyReelsConfig(128, 128, 1, text_dim=16, fps=True))
    monkeypatch.setattr(dit, "load_or_fit", lambda out: basis)
    monkeypatch.setattr(dit, "training_device", lambda: torch.device(device))
    with torch.enable_grad():
        dit.train(tmp_path / "whole", 3, batch=2)
        dit.train(tmp_path / "parts", 3, 2, TrainOptions(until=1, clips=POOL))
        dit.train(tmp_path / "parts", 3, 2)
        dit.train(tmp_path / "on", 1, 2, TrainOptions(start=tmp_path / "whole" / "dit.safetensors"))
    whole, parts, on = (load_file(tmp_path / name / "dit.safetensors") for name in ("whole", "parts", "on"))
    assert device != "cpu" or all(torch.equal(weight, parts[name]) for name, weight in whole.items())
    assert all(torch.allclose(weight, on[name], atol=0.05) for name, weight in whole.items())
    assert any(not torch.equal(weight, on[name]) for name, weight in whole.items())


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    done = train(tmp_path / "done.pt", 6)
    again = train(tmp_path / "done.pt", 6, stop_at=6)
    assert all(torch.equal(v, again.average[k]) for k, v in done.average.items())


def test_no_half_written_file_is_left(tmp_path: Path) -> None:
    train(tmp_path / "run.pt", 6)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_the_average_lags_behind_the_weights(tmp_path: Path) -> None:
    loop = train(tmp_path / "run.pt", 6)
    torch.manual_seed(0)
    start, now, average = Tiny().inner.weight, loop.model.inner.weight, loop.average["inner.weight"]
    assert 0 < (average - start).norm() < (now - start).norm()


def test_the_rate_warms_up_then_falls_to_the_floor() -> None:
    rates = [cosine(step, 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0)
    assert rates[:100] == sorted(rates[:100])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0.03)


def test_every_parameter_has_one_optimiser_and_outputs_stay_with_adam() -> None:
    net = Tiny()
    adam, muon = ([id(p) for group in opt.param_groups for p in group["params"]] for opt in optimisers(net, 1e-3, 1e-2))
    assert sorted(adam + muon) == sorted(id(p) for p in net.parameters())
    assert muon == [id(net.inner.weight)]


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (12, 12)])
def test_orthogonalising_brings_all_singular_values_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_a_piece_from_the_middle_has_history_and_no_special_first_frame() -> None:
    rng = random.Random(1)
    for _ in range(200):
        levels, counts = draw_levels(rng, begun=True)
        assert not counts[0]
        assert levels[0] < FINISHED
    scene = late_scene(3)
    film, whole = render(scene), replace(scene, late=0, frames=scene.late + 60)
    assert len(film) == 60
    assert torch.equal(film[:4], render(whole, scene.late, 4))
    latents = fit(1, lambda seed: make_scene(seed, 5, 64)).encode(film[:, :, :64, :64].transpose(0, 1))
    assert latents.shape[1] == LATENTS


def test_worn_history_is_not_what_is_learnt() -> None:
    """Only chunks that are finished are worn: with none of them a worn batch is the usual one."""
    clips = Clips(fit(3, lambda seed: make_scene(seed, 9, 64)), dit.scene, LATENTS)
    torch.manual_seed(0)
    net = SkyReelsV2(SkyReelsConfig(128, 128, 1, text_dim=256, fps=True))
    net.initialise()
    torch.nn.init.normal_(net.head.head.weight, std=0.1)

    def loss(seed: int, worn: float) -> float:
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(dit, "WORN", worn)
            return float(dit.loss_of(net, clips, clips, 0, 1, seed, 0.0))

    losses = [(loss(seed, 0.0), loss(seed, 1.0)) for seed in range(12)]
    assert any(usual == worn for usual, worn in losses)
    assert any(usual != worn for usual, worn in losses)


def test_a_training_goes_from_pictures_to_whole_clips() -> None:
    draws = [(k + 0.5) / 1000 for k in range(1000)]

    def shares(progress: float) -> list[float]:
        kinds = [beginning_at(BEGINNINGS, progress, draw) for draw in draws]
        return [kinds.count(kind) / len(kinds) for kind in (*BEGINNINGS, None)]

    assert shares(0.0) == pytest.approx([0.7, 0.25, 0.05], abs=2e-3)
    assert shares(0.5) == pytest.approx([0.4, 0.25, 0.35], abs=2e-3)
    assert shares(1.0) == pytest.approx([0.1, 0.25, 0.65], abs=2e-3)


def test_beginnings_of_clips_are_what_the_clips_begin_with() -> None:
    basis = fit(3, lambda seed: make_scene(seed, 9, 64))
    whole, first = (Clips(basis, drawn, frames) for drawn, frames in ((dit.scene, LATENTS), (first_chunk, CHUNK)))
    for index in (2, 7):
        (clip, caption), (begun, same) = whole[index], first[index]
        assert caption == same
        assert torch.equal(begun, clip[:, :CHUNK])


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_beginnings_are_learnt(kind: Beginning) -> None:
    """Steps down the gradient of a batch lower its loss."""
    clips = Clips(fit(3, lambda seed: make_scene(seed, 9, 64)), first_chunk, CHUNK)
    torch.manual_seed(0)
    net = SkyReelsV2(SkyReelsConfig(128, 128, 1, text_dim=256, fps=True))
    net.initialise()
    optimiser, losses = torch.optim.Adam(net.parameters(), 1e-2), list[float]()
    with torch.enable_grad():
        for _ in range(8):
            optimiser.zero_grad()
            loss = dit.beginning_loss_of(net, clips, kind, 0, 1, 5, 2.0)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_cells_that_show_sprites_stand_out() -> None:
    """And what is next to them; the ground does not."""
    scene = replace(make_scene(3, 9), sprites=(Sprite("red", "square", 16.0, 64.0, 64.0, 0.0, 0.0, "stands still"),), occluder=None)
    latents = fit(40, lambda seed: make_scene(seed, 9)).encode(render(scene).transpose(0, 1) * 2 - 1)
    found = standing_out(latents[None])[0, 0]
    assert found[:, 6:10, 6:10].all()
    found[:, 5:11, 5:11] = 0
    assert not found.any()


def test_drawn_noise_levels_are_those_that_sampling_meets() -> None:
    rng = random.Random(0)
    kinds = set()
    for _ in range(2000):
        levels, counts = draw_levels(rng)
        assert len(levels) == len(counts) == CHUNKS
        assert all(0.0 <= level <= 1.0 for level in levels)
        assert any(counts)
        first = counts.index(True)
        assert all(counts[first : first + sum(counts)]), "finished chunks come first, chunks not begun last"
        assert all(level > 0.99 for level in levels[first + sum(counts) :])
        noisy = [level for level, counted in zip(levels, counts, strict=True) if counted]
        assert all(b > a - 1e-3 for a, b in pairwise(noisy)), "an earlier chunk is never noisier than a later one"
        prefix = levels[:first]
        assert all(level <= 0.05 for level in prefix)
        kinds.add((all(counts), len(set(noisy)) == 1, any(prefix)))
    assert len(kinds) >= 6


def test_a_fresh_vae_has_silent_residuals_and_a_fixed_variance() -> None:
    fresh = WanVAE(4)
    initialise(fresh)
    film = torch.rand(1, 3, 5, 32, 32)
    _, log_var = fresh.moments(film)
    assert (log_var == -6).all()
    assert not fresh.encoder.downsamples[0].residual[6].weight.any()
    assert fresh.conv1.weight[:LATENT_CHANNELS].any()


def test_a_vae_that_goes_on_without_steps_is_the_one_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "load_or_fit", lambda out: None)
    before = vae_of(SKYREELS).state_dict()
    vae.train(tmp_path, 0, 0, 0, start=before)
    after = load_file(tmp_path / "vae.safetensors")
    assert after.keys() == before.keys()
    for key, weight in before.items():
        torch.testing.assert_close(after[key].float(), weight, rtol=2**-10, atol=2**-14)
    assert not (tmp_path / "vae.pt").exists()


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What the command says of arguments that it refuses."""
    monkeypatch.setattr(sys, "argv", ["training", *args])
    with pytest.raises(SystemExit, match="2"):
        main()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("missing", "there is no file"),
        ("empty", "(0 bytes) is not a whole"),
        ("magi", "not a Wan 2.1 VAE"),
        ("wide", "another network than tiny-wan-vae.safetensors"),
    ],
)
def test_a_vae_that_training_cannot_begin_with_is_refused(
    kind: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / f"{kind}.safetensors"
    if kind == "empty":
        start.touch()
    elif kind == "magi":
        start = files_of(MAGI)[1]
    elif kind == "wide":
        vae.save(WanVAE(16).state_dict(), start)
    error = told(monkeypatch, capsys, "--out", str(tmp_path / "out"), "vae", "--start", str(start))
    assert "--start: " in error
    assert why in error
    assert not (tmp_path / "out").exists()


def test_a_vae_to_begin_with_leaves_no_autoencoder_to_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "leave --autoencoder-steps out" in told(monkeypatch, capsys, "vae", "--start", str(files_of(SKYREELS)[1]), "--autoencoder-steps", "5")


@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_what_goes_on_from_earlier_weights_has_their_latents(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, bundled = files_of(SKYREELS)
    begun: list[bool] = []

    def trained(out: Path, *args: object, **kwargs: object) -> None:
        begun.append((out / BASIS).read_bytes() == basis_of(bundled).read_bytes())

    recipe = replace(RECIPES["tiny-skyreels"], vae=trained, network=trained)
    monkeypatch.setitem(RECIPES, "tiny-skyreels", recipe)
    monkeypatch.setattr("flowcache_core.training.__main__.vae_of", lambda family, path: vae_of(family))
    monkeypatch.setattr("flowcache_core.training.__main__.reconstruction", lambda *args, **kwargs: 0.0)
    start = str(bundled if stage == "vae" else network)
    monkeypatch.setattr(sys, "argv", ["training", "--out", str(tmp_path), stage, "--start", start])
    main()
    assert begun == [True]
    (tmp_path / BASIS).write_bytes(b"of its own")
    main()
    assert begun == [True, False]
    assert (tmp_path / BASIS).read_bytes() == b"of its own"


@pytest.mark.parametrize(
    ("name", "said"), [("nothing.safetensors", "there is no file nothing.safetensors"), ("tiny-magi.safetensors", "tensors differ in name or shape")]
)
def test_a_network_that_training_cannot_begin_with_is_refused(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = told(monkeypatch, capsys, "--out", str(tmp_path / "out"), "dit", "--start", str(files_of(MAGI)[0].with_name(name)))
    assert "--start: " in error
    assert said in " ".join(error.split())
    assert not (tmp_path / "out").exists()


def test_what_is_installed_comes_with_its_basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, weights = tmp_path / "made", tmp_path / "weights"
    made.mkdir()
    for name in ("dit.safetensors", "vae.safetensors", BASIS):
        (made / name).write_text(name)
    monkeypatch.setattr("flowcache_core.models.bundle.WEIGHTS", weights)
    monkeypatch.setattr(sys, "argv", ["training", "--out", str(made), "install"])
    main()
    assert {path.name: path.read_text() for path in weights.iterdir()} == {
        "tiny-skyreels.safetensors": "dit.safetensors",
        "tiny-wan-vae.safetensors": "vae.safetensors",
        "tiny-wan-vae-basis.safetensors": BASIS,
    }


def test_crops_are_seeded_and_in_range() -> None:
    a, b = crops(3, 2, 5, 32), crops(3, 2, 5, 32)
    assert a.shape == (2, 3, 5, 32, 32)
    assert torch.equal(a, b)
    assert -1 <= a.min() < a.max() <= 1
    assert not torch.equal(a, crops(4, 2, 5, 32))


@pytest.mark.parametrize("name", RECIPES)
def test_previews_of_the_bundled_models_have_the_colours_of_the_film(name: str) -> None:
    recipe = RECIPES[name]
    family = recipe.family
    latents, shown = cells(vae_of(family), recipe.scene(HELD_OUT + 7), family.frames)
    assert family.bundled is not None
    held = family.bundled.preview
    assert held is not None
    seen = latents @ torch.tensor(held.factors) + torch.tensor(held.bias)
    assert (seen - shown).square().mean() < 0.02 * (shown - shown.mean(0)).square().mean()

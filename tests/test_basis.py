"""The latent space of the bundled model: a projection with channels of unit variance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowcache_core.models.bundle import files_of
from flowcache_core.training.basis import Basis, basis_of, fit, hadamard, load_or_fit
from flowcache_core.training.evaluate import vae_of
from flowcache_core.training.recipes import RECIPES
from flowcache_core.training.scenes import make_scene, render


@pytest.fixture(scope="module")
def basis() -> Basis:
    return fit(clips=6)


def film(seed: int, frames: int = 9) -> torch.Tensor:
    return render(make_scene(seed, 57), 0, frames).transpose(0, 1) * 2 - 1


def test_latents_come_back_from_their_picture(basis: Basis) -> None:
    z = torch.randn(16, 3, 4, 4)
    z[:, 0] = basis.encode(basis.decode(z)[:, :1])[:, 0]
    picture = basis.decode(z)
    assert picture.shape == (3, 9, 32, 32)
    torch.testing.assert_close(basis.encode(picture)[:, 1:], z[:, 1:], atol=1e-4, rtol=1e-4)


def test_the_first_frame_counts_as_four_equal_ones(basis: Basis) -> None:
    still = film(3)[:, :1].expand(-1, 9, -1, -1)
    z = basis.encode(still)
    assert z.shape == (16, 3, 16, 16)
    torch.testing.assert_close(z[:, 0], z[:, 1], atol=1e-5, rtol=1e-5)


def test_every_channel_has_unit_variance_and_no_mean(basis: Basis) -> None:
    z = torch.cat([basis.encode(film(seed, 57)) for seed in range(6)], 1)
    assert z.std((1, 2, 3)) == pytest.approx(torch.ones(16), abs=0.02)
    assert z.mean((1, 2, 3)) == pytest.approx(torch.zeros(16), abs=0.1)


def test_sixteen_components_keep_a_clip(basis: Basis) -> None:
    clip = film(20, 57)
    loss = (basis.decode(basis.encode(clip))[:, 1:] - clip[:, 1:]).square().mean()
    assert loss < 0.1 * clip.var()


def test_the_basis_is_kept_and_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load_or_fit(tmp_path / "new", clips=1)
    monkeypatch.setattr("flowcache_core.training.basis.fit", lambda clips: pytest.fail("it was fitted again"))
    again = load_or_fit(tmp_path / "new", clips=1)
    assert torch.equal(made.to, again.to)
    assert torch.equal(made.back, again.back)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.vae])
@torch.inference_mode()
def test_the_bundled_basis_is_of_the_latents_of_the_bundled_vae(name: str) -> None:
    recipe = RECIPES[name]
    family = recipe.family
    clip = render(recipe.scene(10_000_007), frames=24 - 3 * (family.frames.first == 1)).transpose(0, 1) * 2 - 1
    meant = Basis(**load_file(basis_of(files_of(family)[1]))).encode(clip)
    assert (vae_of(family).encode(clip[None])[0] - meant).square().mean() < 0.05 * meant.square().mean()


def test_the_rotation_is_orthogonal() -> None:
    turn = hadamard(16)
    torch.testing.assert_close(turn @ turn.T, torch.eye(16, dtype=turn.dtype))

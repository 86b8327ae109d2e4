"""The Wan VAE: causal in time, and the same in pieces as in one go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowcache_core.models.wan_vae import LATENT_MEAN, Past, WanVAE, denormalise, normalise
from flowcache_core.sampling.frames import FOUR_N_PLUS_1
from flowcache_core.training.vae import fold, unfold

KEYS = (
    "encoder.conv1.weight", "encoder.downsamples.0.residual.0.gamma", "encoder.downsamples.0.residual.2.weight",
    "encoder.downsamples.2.resample.1.weight", "encoder.downsamples.3.shortcut.weight",
    "encoder.downsamples.5.time_conv.weight", "encoder.downsamples.8.time_conv.bias",
    "encoder.middle.1.to_qkv.weight", "encoder.head.2.weight", "conv1.weight", "conv2.bias", "decoder.middle.0.residual.6.weight",
    "decoder.upsamples.3.resample.1.weight", "decoder.upsamples.3.time_conv.weight", "decoder.upsamples.4.shortcut.weight",
    "decoder.upsamples.7.time_conv.bias", "decoder.upsamples.11.resample.1.weight", "decoder.upsamples.14.residual.6.bias", "decoder.head.0.gamma",
)  # fmt: skip


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(3)
    return WanVAE(4).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(1, 16, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def film_of(frames: int, seed: int = 6) -> Tensor:
    return torch.rand(1, 3, frames, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("n", [0, 1, 3])
def test_frames_4n_plus_1_become_n_plus_1_latents_and_come_back(vae: WanVAE, n: int) -> None:
    z = vae.encode(film_of(4 * n + 1))
    assert z.shape == (1, 16, n + 1, 4, 4)
    assert vae.decode(z).shape == (1, 3, 4 * n + 1, 32, 32)


@pytest.mark.parametrize("split", [(1, 4), (4, 1), (2, 3), (1, 1, 3), (1, 1, 1, 1, 1)])
def test_decoding_in_pieces_equals_decoding_at_once(vae: WanVAE, latents: Tensor, split: tuple[int, ...]) -> None:
    past: dict[torch.nn.Module, Tensor] = {}
    pieces = [vae.decode(part, past) for part in latents.split(split, 2)]
    torch.testing.assert_close(torch.cat(pieces, 2), vae.decode(latents), rtol=1e-10, atol=1e-10)


def test_what_is_remembered_between_pieces_is_the_last_frames_alone(vae: WanVAE) -> None:
    """A view of a layer's input would keep all of it until the film is decoded."""
    past: Past = {}
    vae.decode(torch.randn(1, 16, 6, 4, 4, dtype=vae.conv2.weight.dtype), past)
    assert past
    assert all(frames.untyped_storage().nbytes() == frames.nbytes for frames in past.values())


def test_one_call_leaves_nothing_for_the_next(vae: WanVAE, latents: Tensor) -> None:
    assert torch.equal(vae.decode(latents), vae.decode(latents))


@pytest.mark.parametrize("frame", [1, 5, 9])
def test_later_frames_never_change_earlier_latents(vae: WanVAE, frame: int) -> None:
    film = film_of(13)
    other = film.clone()
    other[:, :, frame:] *= -1
    same = [torch.equal(a, b) for a, b in zip(vae.encode(film).unbind(2), vae.encode(other).unbind(2), strict=True)]
    known = FOUR_N_PLUS_1.latent(frame)
    assert same == [True] * known + [False] * (4 - known)


@pytest.mark.parametrize("frame", [1, 3])
def test_later_latents_never_change_earlier_frames(vae: WanVAE, latents: Tensor, frame: int) -> None:
    other = latents.clone()
    other[:, :, frame:] *= -1
    known = FOUR_N_PLUS_1.pixel(frame)
    a, b = vae.decode(latents), vae.decode(other)
    torch.testing.assert_close(a[:, :, :known], b[:, :, :known], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a[:, :, known : known + 4], b[:, :, known : known + 4])


def test_films_of_a_batch_do_not_mix(vae: WanVAE) -> None:
    films = torch.cat([film_of(5, seed) for seed in (1, 2)])
    torch.testing.assert_close(vae.encode(films), torch.cat([vae.encode(f) for f in films.split(1)]), rtol=1e-10, atol=1e-10)


def test_normalising_and_back_is_the_identity(latents: Tensor) -> None:
    torch.testing.assert_close(denormalise(normalise(latents)), latents, rtol=1e-10, atol=1e-10)
    wan = torch.tensor(LATENT_MEAN, dtype=torch.float32).double().view(1, 16, 1, 1, 1).expand(1, 16, 1, 1, 1)
    assert not normalise(wan).any()


def test_folding_gives_wan_statistics_and_decodes_alike(vae: WanVAE) -> None:
    """Latents of the fold, normalised by the Wan format, are the unfolded ones, and decode to the same film."""
    film = torch.rand(1, 3, 5, 32, 32, dtype=torch.float64) * 2 - 1
    folded = WanVAE(4).double().eval()
    folded.load_state_dict(fold({k: v.double() for k, v in vae.state_dict().items()}))
    plain, _ = vae.moments(film)
    torch.testing.assert_close(folded.encode(film), plain)
    torch.testing.assert_close(folded.decode(plain), vae.decoder(vae.conv2(plain), {}))


def test_unfolding_brings_back_what_was_folded(vae: WanVAE) -> None:
    plain = {k: v.double() for k, v in vae.state_dict().items()}
    again = unfold(fold(plain))
    assert again.keys() == plain.keys()
    for key, weight in plain.items():
        torch.testing.assert_close(again[key], weight)


@pytest.mark.parametrize("dim", [4, 8])
def test_the_width_is_read_from_the_shapes(dim: int) -> None:
    weights = WanVAE(dim).state_dict()
    again = WanVAE.from_state_dict(weights)
    assert all(torch.equal(weights[k], v) for k, v in again.state_dict().items())
    assert not again.training


def test_a_dict_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not a Wan 2\.1 VAE: the key decoder\.head\.0\.gamma is missing"):
        WanVAE.from_state_dict({"decoder.conv_in.weight": torch.zeros(1)})


@pytest.mark.parametrize("key", KEYS)
def test_parameters_have_the_names_of_the_released_checkpoint(vae: WanVAE, key: str) -> None:
    assert key in vae.state_dict()


def test_the_released_width_has_the_released_number_of_tensors() -> None:
    with torch.device("meta"):
        assert len(WanVAE(96).state_dict()) == 194

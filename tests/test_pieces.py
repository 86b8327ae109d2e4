"""A film decoded piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from flowcache_core.models import tiles
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.tiles import Tiling
from flowcache_core.models.wan_vae import Past, WanVAE
from flowcache_core.sampling.frames import FOUR_N_PLUS_1
from flowcache_core.show.pieces import AFTER, BEFORE, TAKE, InSuccession, InTiles, Overlapping, Pieces, all_of
from tests.test_memory import Ledger


@pytest.fixture(scope="module")
def vae(bundle: Bundle) -> WanVAE:
    vae: WanVAE = bundle.vae
    return vae


@pytest.fixture(scope="module")
def latents() -> Tensor:
    """Twelve frames of 16 x 16 pixels that change slowly, as those of films do."""
    generator = torch.Generator().manual_seed(4)
    ends = torch.randn(2, 1, 16, 1, 2, 2, generator=generator)
    return torch.cat([torch.lerp(ends[0], ends[1], share) for share in torch.linspace(0, 1, 12)], 2)


def wan(latents: int) -> int:
    """How many frames so many latent frames become."""
    return FOUR_N_PLUS_1.pixel(latents) if latents else 0


def film(decoded: Tensor) -> Tensor:
    """[1, 3, T, H, W] in about -1..1 -> [T, H, W, 3] in 0..1."""
    return (decoded / 2 + 0.5).clamp(0, 1)[0].movedim(0, -1)


def carrying(vae: WanVAE) -> Callable[[Tensor], Tensor]:
    past: Past = {}
    return lambda piece: film(vae.decode(piece, past))


def joined(pieces: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(pieces))


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 12])
def test_the_pieces_are_the_film_decoded_whole(vae: WanVAE, latents: Tensor, frames: int) -> None:
    some = latents[:, :, :frames]
    torch.testing.assert_close(joined(all_of(InSuccession(carrying(vae)), some)), film(vae.decode(some)), rtol=0, atol=1e-5)


def test_the_pieces_follow_one_another_from_a_single_frame_on(vae: WanVAE, latents: Tensor) -> None:
    assert [len(piece) for piece in all_of(InSuccession(carrying(vae)), latents[:, :, :6])] == [1, 8, 8, 4]


def grown(pieces: Pieces, latents: Tensor, chunk: int) -> Tensor:
    """The film as it is decoded chunk by chunk while the rest of it is still noise."""
    out, total = [], latents.shape[2]
    for ready in [*range(chunk, total, chunk), total]:
        growing = latents.clone()
        growing[:, :, ready:] = float("nan")
        while (piece := pieces.next(growing, ready)) is not None:
            out.append(piece)
    assert pieces.done == total
    return torch.cat(out)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_a_film_that_grows_chunk_by_chunk_is_the_film_decoded_whole(vae: WanVAE, latents: Tensor, chunk: int) -> None:
    torch.testing.assert_close(grown(InSuccession(carrying(vae)), latents, chunk), film(vae.decode(latents)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 11])
def test_a_film_that_grows_in_overlapping_pieces_is_nearly_exact(vae: WanVAE, latents: Tensor, chunk: int) -> None:
    pieces = grown(Overlapping(lambda z: film(vae.decode(z)), wan), latents, chunk)
    whole = film(vae.decode(latents))
    assert pieces.shape == whole.shape
    assert float((pieces - whole).abs().mean()) < 0.01


@pytest.mark.parametrize("frames", [1, 3, TAKE, TAKE + 1, 2 * TAKE + 3])
@pytest.mark.parametrize("count", [wan, lambda n: 4 * n, lambda n: n], ids=["4n-3", "4n", "n"])
def test_overlapping_pieces_of_a_decoder_that_looks_no_further_are_exact(frames: int, count: Callable[[int], int]) -> None:
    """A frame of this decoder is the mean of its latent frame and as many before and after it as a piece has around it."""
    latents = torch.rand(1, 1, frames, 1, 1)

    def decode(z: Tensor) -> Tensor:
        line = z.flatten()
        means = [line[max(k - BEFORE, 0) : k + AFTER + 1].mean() for k in range(len(line))]
        return torch.cat([mean.expand(count(k + 1) - count(k)) for k, mean in enumerate(means)]).view(-1, 1, 1, 1)

    torch.testing.assert_close(joined(all_of(Overlapping(decode, count), latents)), decode(latents))


def test_overlapping_pieces_of_a_causal_film_are_nearly_exact(vae: WanVAE) -> None:
    latents = torch.lerp(*torch.randn(2, 1, 16, 1, 2, 2).unbind(0), torch.linspace(0, 1, 20).view(1, 1, -1, 1, 1))
    pieces, whole = joined(all_of(Overlapping(lambda z: film(vae.decode(z)), wan), latents)), film(vae.decode(latents))
    assert pieces.shape == whole.shape == (77, 16, 16, 3)
    assert float((pieces - whole).abs().mean()) < 0.01


def test_a_vae_that_makes_another_number_of_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="this VAE made 1 frames of 8 latent frames instead of 29: is it the VAE of the model"):
        next(all_of(Overlapping(lambda z: torch.zeros(1, 8, 8, 3), wan), torch.zeros(1, 4, 8, 1, 1)))


@pytest.mark.parametrize("frames", [1, 3, 5, 6, 8, 12])
def test_pieces_of_whole_tiles_are_the_film_decoded_whole(frames: int) -> None:
    """Of a decoder in which all frames of a tile see each other; at the end tiles overlap."""
    tiling, latents = Tiling(3, 2), torch.randn(1, 3, frames, 2, 2)

    def decode(z: Tensor) -> Tensor:
        return tiles.in_tiles(z, tiling, lambda part: part + part.mean(), 3)[0].movedim(0, -1)

    whole = decode(latents)
    parts = list(all_of(InTiles(decode, tiling.frames), latents))
    assert torch.equal(torch.cat(parts), whole)
    assert max(map(len, parts)) < 2 * tiling.frames


def test_a_longer_film_needs_no_more_memory(vae: WanVAE) -> None:
    """The most that was alive whenever a piece came out, for a film of five seconds and for one of twenty."""

    def peak(frames: int) -> int:
        latents, most = torch.randn(1, 16, frames, 1, 1), 0
        with Ledger(*vae.parameters(), latents) as ledger:
            for piece in all_of(InSuccession(carrying(vae)), latents):
                most = max(most, ledger.held(piece))
        return most

    assert peak(121) == peak(31)

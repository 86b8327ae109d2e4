"""The MAGI-1 VAE: its formulas written out again, its sizes, and films in tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowcache_core.models.checkpoint import load_network
from flowcache_core.models.magi_vae import LATENT_SCALE, TILING, MagiVAE, MagiVAEConfig, denormalise, normalise, standardised
from flowcache_core.models.tiles import Tiling, in_tiles, shares, spans
from flowcache_core.models.wan_vae import WanVAE
from tests.ledger import Peak

TINY = MagiVAEConfig(dim=256, ffn_dim=64, layers=2, side=4)
SHAPES: dict[str, tuple[int, ...]] = {
    "encoder.patch_embed.proj.weight": (1024, 3, 4, 8, 8), "encoder.patch_embed.proj.bias": (1024,), "encoder.cls_token": (1, 1, 1024),
    "encoder.pos_embed": (1, 4097, 1024), "encoder.blocks.0.attn.qkv.weight": (3072, 1024), "encoder.blocks.0.attn.qkv.bias": (3072,),
    "encoder.blocks.23.attn.proj.weight": (1024, 1024), "encoder.blocks.5.norm2.bias": (1024,), "encoder.blocks.7.mlp.fc1.weight": (4096, 1024),
    "encoder.blocks.7.mlp.fc2.weight": (1024, 4096), "encoder.norm.weight": (1024,), "encoder.last_layer.weight": (32, 1024),
    "decoder.proj_in.weight": (1024, 16), "decoder.pos_embed": (1, 4097, 1024), "decoder.cls_token": (1, 1, 1024),
    "decoder.blocks.23.mlp.fc2.bias": (1024,), "decoder.norm.bias": (1024,), "decoder.last_layer.weight": (3, 4, 3, 3, 3),
    "decoder.last_layer.bias": (3,),
}  # fmt: skip


def random_vae(config: MagiVAEConfig = TINY, seed: int = 3) -> MagiVAE:
    torch.manual_seed(seed)
    vae = MagiVAE(config).double()
    for p in vae.parameters():
        nn.init.normal_(p, std=0.05)
    return vae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def vae() -> MagiVAE:
    return random_vae()


def film_of(frames: int, height: int = 32, width: int = 32, seed: int = 6) -> Tensor:
    return torch.rand(1, 3, frames, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents_of(frames: int, height: int = 4, width: int = 4, seed: int = 5) -> Tensor:
    return torch.randn(1, 16, frames, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# formulas, written out


def plain_standardised(x: Tensor) -> Tensor:
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    deviation = ((x - mean) ** 2).sum(-1, keepdim=True).div(x.shape[-1]).sqrt()
    return (x - mean) / (deviation + 1e-5)


def plain_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def plain_attention(x: Tensor, layer: Any) -> Tensor:
    """Head by head."""
    dim = x.shape[-1]
    said = x @ layer.qkv.weight.T + layer.qkv.bias
    heads = []
    for head in range(dim // 64):
        q, k, v = (plain_standardised(said[..., part * dim + head * 64 : part * dim + head * 64 + 64]) for part in range(3))
        scores = (q @ k.transpose(1, 2) / 8).exp()
        heads.append(scores / scores.sum(-1, keepdim=True) @ v)
    return torch.cat(heads, -1) @ layer.proj.weight.T + layer.proj.bias


def plain_block(x: Tensor, block: Any) -> Tensor:
    x = x + plain_attention(x, block.attn)
    hidden = plain_norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def between(size: int, learned: int) -> Tensor:
    """[size, learned]: centres of the new cells on the line through the centres of the learned ones, held at both ends."""
    out = torch.zeros(size, learned, dtype=torch.float64)
    for new in range(size):
        at = min(max((new + 0.5) * learned / size - 0.5, 0), learned - 1)
        low = min(int(at), learned - 1)
        out[new, low] += 1 - (at - low)
        out[new, min(low + 1, learned - 1)] += at - low
    return out


def plain_places(pos_embed: Tensor, grid: tuple[int, int, int], side: int) -> Tensor:
    learned = pos_embed[0, 1:].view(4, side, side, -1)
    new = torch.einsum("at,bh,cw,thwd->abcd", between(grid[0], 4), between(grid[1], side), between(grid[2], side), learned)
    return torch.cat([pos_embed[:, :1], new.reshape(1, -1, new.shape[-1])], 1)


def plain_stack(tokens: Tensor, half: Any, grid: tuple[int, int, int]) -> Tensor:
    x = torch.cat([half.cls_token, tokens], 1) + plain_places(half.pos_embed, grid, half.grid[1])
    for block in half.blocks:
        x = plain_block(x, block)
    return plain_norm(x, half.norm)[:, 1:]


def plain_encoder(film: Tensor, encoder: Any) -> Tensor:
    """Patch by patch into tokens; -> [1, 32, f, h, w]."""
    grid = film.shape[2] // 4, film.shape[3] // 8, film.shape[4] // 8
    patches = [film[0, :, 4 * t : 4 * t + 4, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] for t, y, x in product(*map(range, grid))]
    weight, bias = encoder.patch_embed.proj.weight.flatten(1), encoder.patch_embed.proj.bias
    tokens = torch.stack([weight @ patch.flatten() + bias for patch in patches])[None]
    said = plain_stack(tokens, encoder, grid) @ encoder.last_layer.weight.T + encoder.last_layer.bias
    return said.view(1, *grid, -1).permute(0, 4, 1, 2, 3)


def plain_decoder(z: Tensor, decoder: Any) -> Tensor:
    """Token by token into pixels, then 27 shifted products; -> [1, 3, 4f, 8h, 8w]."""
    f, h, w = z.shape[2:]
    cells = torch.stack([z[0, :, t, y, x] for t, y, x in product(range(f), range(h), range(w))])[None]
    tokens = cells @ decoder.proj_in.weight.T + decoder.proj_in.bias
    said = plain_stack(tokens, decoder, (f, h, w))[0]
    channels = said.shape[-1] // 256
    pixels = torch.zeros(channels, 4 * f + 2, 8 * h + 2, 8 * w + 2, dtype=torch.float64)
    for number, token in enumerate(said):
        t, y, x = 4 * (number // (h * w)), 8 * (number // w % h), 8 * (number % w)
        pixels[:, 1 + t : 5 + t, 1 + y : 9 + y, 1 + x : 9 + x] = token.view(4, 8, 8, channels).permute(3, 0, 1, 2)
    kernel, out = decoder.last_layer.weight, decoder.last_layer.bias.view(3, 1, 1, 1)
    for a, b, c in product(range(3), repeat=3):
        out = out + torch.einsum("oi,ithw->othw", kernel[:, :, a, b, c], pixels[:, a : a + 4 * f, b : b + 8 * h, c : c + 8 * w])
    return out[None]


def close(mine: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-10)


def test_standardised_values_have_mean_0_and_deviation_1() -> None:
    x = torch.randn(2, 5, 3, 4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3 + 2
    close(standardised(x), plain_standardised(x))
    assert standardised(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(standardised(x.bfloat16()).double(), plain_standardised(x.bfloat16().double()), rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_attention_and_blocks_are_their_formulas(vae: MagiVAE, half: str) -> None:
    x, block = torch.randn(2, 7, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), getattr(vae, half).blocks[1]
    close(block.attn(x), plain_attention(x, block.attn))
    close(block(x), plain_block(x, block))


@pytest.mark.parametrize("grid", [(4, 4, 4), (3, 4, 4), (1, 1, 1), (2, 5, 3), (9, 2, 8)])
def test_learned_places_are_interpolated_to_other_sizes(vae: MagiVAE, grid: tuple[int, int, int]) -> None:
    close(vae.encoder.places(grid), plain_places(vae.encoder.pos_embed, grid, 4))


def test_places_of_the_learned_size_are_the_learned_ones(vae: MagiVAE) -> None:
    assert torch.equal(vae.decoder.places((4, 4, 4)), vae.decoder.pos_embed)


@pytest.mark.parametrize("grid", [(3, 4, 4), (1, 2, 3)])
def test_encoder_and_decoder_are_their_formulas(vae: MagiVAE, grid: tuple[int, int, int]) -> None:
    film, z = film_of(4 * grid[0], 8 * grid[1], 8 * grid[2]), latents_of(*grid)
    mean, log_var = plain_encoder(film, vae.encoder).split(16, 1)
    close(vae.moments(film)[0], mean)
    close(vae.moments(film)[1], log_var)
    close(vae.encode(film, None), mean * 0.18215)
    close(vae.decode(z, None), plain_decoder(z / 0.18215, vae.decoder))


def test_two_channels_of_pixels_lie_as_published() -> None:
    """The released decoder has four; the tiny one, one."""
    wide = random_vae(MagiVAEConfig(dim=512, ffn_dim=16, layers=1, side=2))
    z = latents_of(2, 1, 2)
    close(wide.decoder(z), plain_decoder(z, wide.decoder))


def test_normalising_and_back_is_the_identity() -> None:
    z = latents_of(2)
    torch.testing.assert_close(denormalise(normalise(z)), z)
    assert torch.equal(normalise(z), z * LATENT_SCALE)


# films


@pytest.mark.parametrize("n", [1, 3])
def test_frames_4n_become_n_latents_and_come_back(vae: MagiVAE, n: int) -> None:
    z = vae.encode(film_of(4 * n))
    assert z.shape == (1, 16, n, 4, 4)
    assert vae.decode(z).shape == (1, 3, 4 * n, 32, 32)


def test_a_single_frame_stands_still_for_four(vae: MagiVAE) -> None:
    frame = film_of(1)
    assert torch.equal(vae.encode(frame), vae.encode(frame.expand(-1, -1, 4, -1, -1)))


def test_films_of_a_batch_do_not_mix(vae: MagiVAE) -> None:
    films = torch.cat([film_of(4, seed=seed) for seed in (1, 2)])
    close(vae.encode(films), torch.cat([vae.encode(one) for one in films.split(1)]))


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 3, 9, 32, 32), "9 frames are not 4n: use 8 or 12"),
        ((1, 3, 8, 32, 36), "a picture of 36x32 does not divide into cells of 8 pixels: use sides that are multiples of 8"),
        ((1, 3, 8, 30, 32), "a picture of 32x30 does not"),
    ],
)
def test_films_that_do_not_divide_are_refused(vae: MagiVAE, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        vae.encode(torch.zeros(shape))


# tiles


@pytest.mark.parametrize(
    ("length", "size", "common", "tiles"),
    [
        (3, 3, 0, [(0, 3)]),
        (2, 3, 0, [(0, 2)]),
        (6, 3, 0, [(0, 3), (3, 6)]),
        (8, 3, 0, [(0, 3), (3, 6), (5, 8)]),
        (90, 32, 8, [(0, 32), (24, 56), (48, 80), (58, 90)]),
        (56, 32, 8, [(0, 32), (24, 56)]),
    ],
)
def test_tiles_are_whole_and_reach_the_end(length: int, size: int, common: int, tiles: list[tuple[int, int]]) -> None:
    assert spans(length, size, common) == tiles


@pytest.mark.parametrize("common", [0, 1, 3, 6])
@pytest.mark.parametrize("length", range(5, 40, 3))
def test_shares_add_up_to_1_at_every_place(length: int, common: int) -> None:
    tiles = spans(length, 7, common)
    total = torch.zeros(length)
    for (start, end), share in zip(tiles, shares(tiles), strict=True):
        assert share.shape == (end - start,)
        assert (share > 0).all()
        total[start:end] += share
    torch.testing.assert_close(total, torch.ones(length))


def test_a_share_is_a_line_over_what_two_tiles_have_in_common() -> None:
    first, second = shares([(0, 6), (2, 8)])
    torch.testing.assert_close(first, torch.tensor([1, 1, 0.875, 0.625, 0.375, 0.125]))
    torch.testing.assert_close(second, first.flip(0))


@pytest.mark.parametrize("tiling", [Tiling(2, 3), Tiling(2, 3, 1, 2), Tiling(1, 4, 0, 1), TILING])
def test_tiles_that_are_left_as_they_are_make_the_film(tiling: Tiling) -> None:
    z = latents_of(5, 7, 6)
    torch.testing.assert_close(in_tiles(z, tiling, lambda tile: tile, 16), z, rtol=1e-6, atol=1e-6)
    film = in_tiles(z[:, :3], tiling, enlarged, 3, made=(4, 8, 8))
    blocks = film.unflatten(2, (5, 4)).unflatten(4, (7, 8)).unflatten(6, (6, 8))
    torch.testing.assert_close(blocks.mean((3, 5, 7)), z[:, :3], rtol=1e-6, atol=1e-6)


def enlarged(tile: Tensor) -> Tensor:
    return tile.repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)


def test_a_tile_that_covers_the_film_is_the_film_bit_for_bit(vae: MagiVAE) -> None:
    film, z = film_of(12, 40, 24), latents_of(3, 5, 3)
    for tiling in (TILING, Tiling(3, 5, 2, 4)):
        assert torch.equal(vae.encode(film, tiling), vae.encode(film, None))
        assert torch.equal(vae.decode(z, tiling), vae.decode(z, None))


def test_a_film_in_pieces_of_whole_tiles_equals_the_film_in_one_call(vae: MagiVAE) -> None:
    z = latents_of(9, 4, 4)
    pieces = [vae.decode(part) for part in z.split((6, 3), 2)]
    assert torch.equal(torch.cat(pieces, 2), vae.decode(z))


def test_tiles_without_anything_in_common_are_decoded_by_themselves(vae: MagiVAE) -> None:
    z = latents_of(1, 4, 8)
    apart = torch.cat([vae.decode(part, None) for part in z.split(4, 4)], 4)
    assert torch.equal(vae.decode(z, Tiling(1, 4)), apart)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_seam_is_left_where_tiles_overlap(seed: int) -> None:
    """What tiles change of a film jumps where they are cut off, four times as much as elsewhere at least; blended, it jumps nowhere."""
    one, z = random_vae(seed=seed), latents_of(1, 4, 24)
    whole = one.decode(z, None)

    def worst(common: int) -> float:
        changed = one.decode(z, Tiling(1, 8, 0, common)) - whole
        jumps = (changed[..., 1:] - changed[..., :-1]).abs().mean((0, 1, 2, 3))
        return float(jumps.max() / jumps.mean())

    assert worst(0) > 4
    assert worst(2) < 2


def test_a_film_keeps_its_dtype_and_tiles_have_that_of_the_weights(vae: MagiVAE) -> None:
    half, z = random_vae().bfloat16(), latents_of(2).float()
    for tiling in (None, Tiling(1, 3, 0, 1)):
        film = half.decode(z, tiling)
        assert film.dtype == half.encode(film, tiling).dtype == torch.float32
        torch.testing.assert_close(film.double(), vae.decode(z.double(), tiling), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((0, 32), "tiles of 0 latent frames"),
        ((3, 8, 3), "3 latent frames cannot have 3 in common"),
        ((3, 8, 0, -1), "8 latent cells a side cannot have -1"),
    ],
)
def test_tiles_of_impossible_sizes_are_refused(sizes: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Tiling(*sizes)


def held(vae: MagiVAE, what: str, x: Tensor, tiling: Tiling | None) -> int:
    """Bytes beside the film and its latents."""
    with Peak(x, *vae.parameters()) as peak:
        made = getattr(vae, what)(x, tiling)
    return peak.most - made.untyped_storage().nbytes()


SMALL = Tiling(1, 4, 0, 1)


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_a_film_in_tiles_needs_memory_for_one_tile(vae: MagiVAE, what: str) -> None:
    """But for a few numbers along its axes; a film at once needs the square of its cells."""

    def of(frames: int, side: int) -> Tensor:
        return film_of(4 * frames, 8 * side, 8 * side) if what == "encode" else latents_of(frames, side, side)

    tile = held(vae, what, of(1, 4), SMALL)
    larger = [held(vae, what, of(frames, side), SMALL) for frames, side in ((1, 7), (3, 4), (2, 10))]
    assert all(0 <= one - tile < 4096 for one in larger)
    assert held(vae, what, of(2, 10), None) > 4 * tile


# checkpoints


@pytest.fixture(scope="module")
def released() -> MagiVAE:
    with torch.device("meta"):
        return MagiVAE()


@pytest.mark.parametrize("key", SHAPES)
def test_parameters_have_the_released_names_and_shapes(released: MagiVAE, key: str) -> None:
    assert tuple(released.state_dict()[key].shape) == SHAPES[key]


def test_the_released_sizes_make_the_released_number_of_parameters(released: MagiVAE) -> None:
    """614 million, says the report."""
    assert len(released.state_dict()) == 496
    assert sum(p.numel() for p in released.parameters()) == 613_755_239


def test_a_tile_of_the_released_settings_has_the_released_shapes(released: MagiVAE) -> None:
    film = torch.empty(1, 3, 12, 256, 256, device="meta")
    mean, log_var = released.moments(film)
    assert mean.shape == log_var.shape == (1, 16, 3, 32, 32)
    assert released.decoder(mean).shape == film.shape


def test_the_released_settings_cut_720p_as_they_should() -> None:
    assert [len(axis) for axis in TILING.spans((24, 90, 160))] == [8, 4, 7]


@pytest.mark.parametrize("config", [TINY, MagiVAEConfig(512, 48, 1, 8, 2), MagiVAEConfig()])
def test_sizes_are_read_from_the_shapes(config: MagiVAEConfig) -> None:
    with torch.device("meta"):
        assert MagiVAEConfig.from_shapes({k: tuple(v.shape) for k, v in MagiVAE(config).state_dict().items()}) == config


def test_tensors_are_taken_as_they_are(vae: MagiVAE) -> None:
    weights = vae.state_dict()
    again = MagiVAE.from_state_dict(weights)
    assert all(p.data_ptr() == weights[k].data_ptr() for k, p in again.named_parameters())
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())


def test_the_vae_of_another_model_is_refused_and_this_one_by_it(vae: MagiVAE) -> None:
    with pytest.raises(ValueError, match=r"not a MAGI-1 VAE: the key encoder\.patch_embed\.proj\.weight is missing; the released one is ckpt/vae/"):
        MagiVAE.from_state_dict(WanVAE(4).state_dict())
    with pytest.raises(ValueError, match=r"not a Wan 2\.1 VAE"):
        WanVAE.from_state_dict(vae.state_dict())


def test_the_loader_of_networks_says_that_this_is_a_vae(vae: MagiVAE) -> None:
    with pytest.raises(ValueError, match=r"a\.safetensors is the VAE of MAGI-1: put it into models/vae and use Load MAGI-1 VAE"):
        load_network(vae.state_dict(), "a.safetensors", torch.float32)


def broken() -> Iterator[Any]:
    key = "encoder.blocks.1.norm2.weight"
    yield pytest.param({key: None}, rf"1 of 56 keys are missing, such as {key}", id="missing")
    yield pytest.param({"encoder.final_proj.weight": (4, 4)}, "1 of 56 keys are unknown, such as encoder.final_proj.weight", id="unknown")
    yield pytest.param({"decoder.norm.weight": (7,)}, r"decoder.norm.weight has shape \(7,\), its other sizes ask for \(256,\)", id="shape")
    yield pytest.param({"encoder.pos_embed": (1, 4)}, r"encoder.pos_embed has shape \(1, 4\); download", id="axes")
    yield pytest.param({"encoder.pos_embed": (1, 80, 256)}, "79 learned places do not make 4 latent frames of a square", id="places")
    yield pytest.param({"encoder.patch_embed.proj.weight": (192, 3, 4, 8, 8)}, "its width 192 is not a multiple of 256", id="width")
    yield pytest.param({"encoder.blocks.999999999.norm2.weight": (256,)}, "names block 999999999, and at most 256 are known", id="deep")


def test_a_vae_of_whole_numbers_is_refused(vae: MagiVAE) -> None:
    weights = {key: weight.int() if key == "decoder.norm.weight" else weight for key, weight in vae.state_dict().items()}
    with pytest.raises(ValueError, match=r"decoder\.norm\.weight is stored as int32, and its weights are floating-point numbers"):
        MagiVAE.from_state_dict(weights)


@pytest.mark.parametrize(("changed", "said"), list(broken()))
def test_a_vae_that_is_not_whole_is_refused(vae: MagiVAE, changed: dict[str, tuple[int, ...] | None], said: str) -> None:
    weights = {k: v for k, v in vae.state_dict().items() if k not in changed}
    weights |= {k: torch.zeros(shape) for k, shape in changed.items() if shape}
    with pytest.raises(ValueError, match=said):
        MagiVAE.from_state_dict(weights)

"""The Triton kernels of column sums against plain PyTorch, in Triton's interpreter, and on CUDA where there is a card."""

from __future__ import annotations

from tests.interpreted import DEVICES, NEEDS_TRITON, PREPARED, agrees

SCRIPT = """
from flowcache_core.kernels import columns_triton
from flowcache_core.kernels.columns import column_sums
from flowcache_core.kernels.columns_triton import TILES, Tile

def agree(q, k, sums, largest):
    heads, group, d = k.shape[1], q.shape[1] // k.shape[1], k.shape[3]
    logits = q.double().unflatten(1, (heads, group)) @ k.double().mT.unsqueeze(2) / d**0.5
    exact = logits.amax(2).softmax(-1).sum(2) if largest else logits.softmax(-1).mean(2).sum(2)
    torch.testing.assert_close(sums.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.sum(-1), torch.full(k.shape[:2], float(q.shape[2])), rtol=1e-5, atol=1e-5)

for films, heads, group, queries, keys, d in ((1, 1, 1, 1, 1, 16), (2, 2, 3, 65, 63, 16), (1, 2, 2, 7, 129, 32), (2, 1, 1, 70, 130, 128)):
    for dtype in (torch.float16, torch.bfloat16):
        cache = torch.randn(films, heads, keys + 9, d).to(dtype)
        q, k = (3 * torch.randn(films, queries, heads * group, d)).to(dtype).transpose(1, 2), cache[:, :, 4 : 4 + keys]
        assert columns_triton.serves(q, k)
        for grouped in ("max", "mean"):
            agree(q, k, column_sums(q, k, grouped), grouped == "max")
    TILES[8, 0] = Tile(128, 64, 8, 3)

wide = space(2**31 + 2**15)
far = wide.as_strided((2, 1, 3, 16), (2**31, 1, 64, 1)).copy_(torch.randn(2, 1, 3, 16))
apart = wide.as_strided((1, 1, 3, 16), (1, 1, 2**30, 1)).copy_(torch.randn(1, 1, 3, 16))
for k in (far, apart):
    q = torch.randn(k.shape[0], 1, 5, 16).half()
    agree(q, k, columns_triton.column_sums(q, k, False), False)
print("agree")
"""
LIMITS = {(8, 0): 163, (8, 6): 99, (9, 0): 227, (12, 0): 99}
"""KiB of shared memory that a block can have (CUDA C++ Programming Guide, table of compute capabilities)."""


@NEEDS_TRITON
@DEVICES
def test_the_triton_kernels_agree_with_pytorch(device: str) -> None:
    agrees(PREPARED + SCRIPT, device)


@NEEDS_TRITON
def test_every_tile_fits_its_card() -> None:
    from flowcache_core.kernels.columns_triton import TILES

    assert {card: tile.shared(128) <= LIMITS[card] * 1024 for card, tile in TILES.items()} == dict.fromkeys(LIMITS, True)

"""The Triton kernels of MAGI-1's layers against float64 and against PyTorch, in Triton's interpreter, and on CUDA where there is a card."""

from __future__ import annotations

import pytest

from tests.interpreted import DEVICES, FILM, NEEDS_TRITON, PREPARED, agrees

pytestmark = NEEDS_TRITON

HEADS = """
from flowcache_core.kernels import head_rotation_triton
from flowcache_core.kernels.head_rotation import heads_normed, in_pytorch, write_heads_normed

def exactly(x, weight, bias, rope, d):
    x = F.layer_norm(x.double().unflatten(-1, (-1, d)).transpose(1, 2), (d,), 1 + weight.double(), bias.double(), 1e-6)
    if rope is None:
        return x
    n, rope = rope.shape[1], rope.to(torch.complex128)
    a, b = x[..., :n], x[..., n : 2 * n]
    return torch.cat([a * rope.real - b * rope.imag, a * rope.imag + b * rope.real, x[..., 2 * n :]], -1)

for films, tokens, heads, d, pairs in ((1, 1, 1, 2, 1), (2, 7, 3, 16, 6), (1, 63, 1, 8, 3), (1, 64, 1, 16, 8), (1, 65, 2, 8, 3), (1, 129, 1, 32, 12),
                                       (1, 5, 2, 128, 48)):
    rope = phases(tokens, pairs).to(torch.complex64)
    for dtype in DTYPES:
        x, v = (torch.randn(films, tokens, heads * d + 3).to(dtype)[:, :, : heads * d] for _ in range(2))
        weight, bias = torch.randn(2, d).to(dtype)
        assert head_rotation_triton.serves(x, weight, bias, rope, d)
        for turns in (rope, None):
            out = heads_normed(x, weight, bias, 1e-6, turns, d)
            close(out, exactly(x, weight, bias, turns, d), dtype, roundings=4 if dtype == torch.float32 else 1)
            loose = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(out, in_pytorch(x, weight, bias, 1e-6, turns, d), rtol=loose, atol=max(loose, 1e-5))
            if tokens < 9:
                assert torch.equal(out, heads_normed(x, weight, bias, 1e-6, turns, d))
                written(out, v, lambda keys, values, at: write_heads_normed(keys, values, at, x, v, weight, bias, 1e-6, turns))

none, rope = torch.zeros(16), phases(3, 6).to(torch.complex64)
for dtype in DTYPES:
    same = torch.full((1, 3, 32), 7.0, dtype=dtype)
    assert torch.equal(heads_normed(same, none, none + 2, 1e-6, None, 16), torch.full((1, 2, 3, 16), 2.0, dtype=dtype)), "no spread: the bias"
    large = (torch.randn(1, 3, 32) * (1e4 if dtype == torch.float16 else 1e15)).to(dtype)
    close(heads_normed(large, none, none, 1e-6, rope, 16), exactly(large, none, none, rope, 16), dtype)

x, keys, values = far_apart(2, 3, 16), far_apart(2, 8, 16)[:, None], torch.zeros(2, 1, 8, 16).half()
fresh = heads_normed(x, none, none, 1e-6, rope, 16)
close(fresh, exactly(x, none, none, rope, 16), torch.float16)
write_heads_normed(keys, values, slice(5, 8), x, x, none, none, 1e-6, rope)
assert torch.equal(keys[:, :, 5:], fresh) and torch.equal(values[:, 0, 5:], x)
wider = phases(3, 9).to(torch.complex64)
for weight, turns, d in ((none.double(), rope, 16), (none, rope.to(torch.complex128), 16), (none, wider, 16), (none, rope, 12)):
    assert not head_rotation_triton.serves(x, weight, none, turns, d)
x, slots = torch.randn(2, 3, 32), (torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16))
torch.library.opcheck(torch.ops.flowcache.heads_normed, (x, none, none, 1e-6, rope, 16))
for index, turns in ((None, rope), (torch.tensor([4, 0, 5]), None)):
    torch.library.opcheck(torch.ops.flowcache.write_heads_normed, (*slots, index, 2, x, x, none, none, 1e-6, turns))
print("agree")
"""

POST_NORM = """
from flowcache_core.kernels import modulation_triton, swiglu_triton
from flowcache_core.kernels.modulation import gated_normed, gated_normed_in_pytorch
from flowcache_core.kernels.swiglu import in_pytorch, swiglu

def exactly(x, y, gate, weight, bias):
    y = y.double() * gate.double().repeat_interleave(x.shape[1] // gate.shape[1], 1)
    return x.double() + F.layer_norm(y, y.shape[-1:], 1 + weight.double(), bias.double(), 1e-6)

for films, rows, frames, tokens, width in ((1, 1, 1, 1, 1), (1, 1, 1, 7, 63), (2, 2, 1, 7, 64), (1, 1, 7, 7, 65), (2, 2, 3, 6, 129),
                                           (1, 1, 3, 129, 16)):
    for dtype in DTYPES if tokens < 64 else DTYPES[2:]:
        x, y = (3 * torch.randn(films, tokens, width + 5).to(dtype)[:, :, :width] for _ in range(2))
        gate, (weight, bias) = torch.randn(rows, frames, 2 * width).tanh().chunk(2, -1)[1], torch.randn(2, width).to(dtype)
        assert modulation_triton.serves_post_norm(x, y, gate, weight, bias)
        out = gated_normed(x, y, gate, weight, bias, 1e-6)
        close(out, exactly(x, y, gate, weight, bias), dtype, roundings=4 if dtype == torch.float32 else 1)
        assert tokens > 9 or torch.equal(out, gated_normed(x, y, gate, weight, bias, 1e-6))
        loose = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(out, gated_normed_in_pytorch(x, y, gate, weight, bias, 1e-6), rtol=loose, atol=max(loose, 1e-5))
        x = 3 * torch.randn(films, tokens, 2 * width).to(dtype)
        a, b = x.double().chunk(2, -1)
        out = swiglu(x)
        close(out, a * torch.sigmoid(a) * b, dtype)
        assert tokens > 9 or torch.equal(out, swiglu(x))
        torch.testing.assert_close(out, in_pytorch(x), rtol=2 * loose, atol=1e-5)

gate, none, x = torch.full((1, 1, 16), -0.5), torch.zeros(16), torch.randn(1, 3, 16)
assert torch.equal(gated_normed(x, torch.full_like(x, 7.0), gate, none, none, 1e-6), x), "no spread: nothing is added"
large = 1e15 * x
close(gated_normed(x, large, gate, none, none, 1e-6), exactly(x, large, gate, none, none), torch.float32)
assert torch.equal(swiglu(torch.tensor([[[-1e4, 1e4, 1.0, 1.0]]])), torch.tensor([[[0.0, 1e4]]]))
x = far_apart(2, 3, 16)
close(gated_normed(x, x, gate, none, none, 1e-6), exactly(x, x, gate, none, none), torch.float16)
wide = torch.randn(1, 2, 2 * swiglu_triton.CHANNELS + 6)
a, b = wide.double().chunk(2, -1)
close(swiglu(wide), a * torch.sigmoid(a) * b, torch.float32)
assert not swiglu_triton.serves(wide[:, :, 1:])
assert not modulation_triton.serves_post_norm(x, x.float(), gate, none, none)
assert not modulation_triton.serves_post_norm(x, x, torch.randn(1, 2, 16), none, none)
x = torch.randn(2, 6, 16)
torch.library.opcheck(torch.ops.flowcache.gated_normed, (x, x, gate, none, none, 1e-6))
torch.library.opcheck(torch.ops.flowcache.swiglu, (x,))
print("agree")
"""

CALLED = """
from flowcache_core.kernels import head_rotation, modulation, swiglu
GEOMETRIES["gated"] = replace(GEOMETRIES["smoke-magi"], config=replace(GEOMETRIES["smoke-magi"].config, channels=32, gated=True))
agree_on("gated", (head_rotation, modulation, swiglu), {head_rotation.OPERATION, modulation.POST_NORM, swiglu.OPERATION}, steps=4)
print("agree")
"""


@DEVICES
@pytest.mark.parametrize("script", [HEADS, POST_NORM, FILM + CALLED], ids=["heads", "post-norm", "film"])
def test_the_kernels_agree_with_pytorch(script: str, device: str) -> None:
    """Sizes of 1, 7, 63 to 65 and 129; strides; no spread; large numbers; more than 2^31 elements; twice the same; slots of a KV cache; films within
    a tolerance."""
    agrees(PREPARED + script, device)

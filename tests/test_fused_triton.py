"""The Triton kernels around attention against float64 and against PyTorch, in Triton's interpreter, and on CUDA where there is a card."""

from __future__ import annotations

import pytest

from tests.interpreted import DEVICES, FILM, NEEDS_TRITON, PREPARED, agrees

pytestmark = NEEDS_TRITON

ROTATION = """
from flowcache_core.kernels import rotation_triton
from flowcache_core.kernels.rotation import in_pytorch, normed_rotated, write_normed_rotated
from flowcache_core.kernels.slots_triton import serves_slots

def exactly(x, weight, rope, d):
    x = x.double()
    x = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()).unflatten(-1, (-1, d)).transpose(1, 2)
    if rope is None:
        return x
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * rope.to(torch.complex128)
    return torch.view_as_real(pairs).flatten(-2)

for films, tokens, heads, d in ((1, 1, 1, 2), (2, 7, 3, 16), (1, 63, 2, 8), (1, 64, 1, 16), (1, 65, 1, 16), (1, 129, 2, 4), (1, 5, 2, 128)):
    rope = phases(tokens, d // 2).to(torch.complex64)
    for dtype in DTYPES:
        wide = torch.randn(films, tokens, heads * d + 3).to(dtype)
        x, weight = wide[:, :, : heads * d], torch.randn(heads * d).to(dtype)
        assert rotation_triton.serves(x, weight, rope, d)
        for turns in (rope, None):
            out = normed_rotated(x, weight, 1e-6, turns, d)
            close(out, exactly(x, weight, turns, d), dtype)
            assert tokens > 9 or torch.equal(out, normed_rotated(x, weight, 1e-6, turns, d))
            twin = in_pytorch(x, weight, 1e-6, turns, d)
            torch.testing.assert_close(out, twin, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)

few = torch.tensor([1, 4, 2])
rope, x = phases(6, 8).to(torch.complex64), torch.randn(1, 6, 32)
whole = normed_rotated(x, torch.ones(32), 1e-6, rope, 16)
assert torch.equal(normed_rotated(x[:, few], torch.ones(32), 1e-6, rope[few], 16), whole[:, :, few])

still = torch.ones(5, 8, dtype=torch.complex64)
x = torch.randn(2, 5, 32).sign().bfloat16()
assert torch.equal(normed_rotated(x, torch.ones(32).bfloat16(), 0.0, still, 16), x.unflatten(-1, (2, 16)).transpose(1, 2))

for dtype in DTYPES:
    nothing = torch.zeros(1, 3, 32, dtype=dtype)
    assert not normed_rotated(nothing, torch.ones(32, dtype=dtype), 1e-6, still[:3], 16).any()
    large = (torch.randn(1, 3, 32) * (1e4 if dtype == torch.float16 else 1e15)).to(dtype)
    close(normed_rotated(large, torch.ones(32, dtype=dtype), 1e-6, still[:3], 16), exactly(large, torch.ones(32), still[:3], 16), dtype)

x = far_apart(2, 3, 16)
close(normed_rotated(x, torch.ones(16).half(), 1e-6, still[:3], 16), exactly(x, torch.ones(16), still[:3], 16), torch.float16)
assert not rotation_triton.serves(x, torch.ones(16), still[:3], 16)
odd = torch.randn(1, 3, 36)
assert not rotation_triton.serves(odd, torch.ones(36), phases(3, 6).to(torch.complex64), 12)
six = phases(3, 6).to(torch.complex64)
assert torch.equal(normed_rotated(odd, torch.ones(36), 1e-6, six, 12), in_pytorch(odd, torch.ones(36), 1e-6, six, 12))

for films, tokens, heads, d in ((1, 1, 1, 2), (2, 7, 2, 16), (1, 17, 1, 8)):
    rope = phases(tokens, d // 2).to(torch.complex64)
    for dtype in DTYPES:
        k, v = (torch.randn(films, tokens, heads * d + 3).to(dtype)[:, :, : heads * d] for _ in range(2))
        weight = torch.randn(heads * d).to(dtype)
        for turns in (rope, None):
            fresh = normed_rotated(k, weight, 1e-6, turns, d)
            written(fresh, v, lambda keys, values, at: write_normed_rotated(keys, values, at, k, v, weight, 1e-6, turns))

keys, values = far_apart(2, 8, 16)[:, None], torch.zeros(2, 1, 8, 16).half()
k, v, weight = torch.randn(2, 3, 16).half(), torch.randn(2, 3, 16).half(), torch.ones(16).half()
assert serves_slots(keys, values, None, 5, k, v)
with torch.inference_mode():
    write_normed_rotated(keys, values, slice(5, 8), k, v, weight, 1e-6, still[:3])
assert torch.equal(keys[:, :, 5:], normed_rotated(k, weight, 1e-6, still[:3], 16))
for index, first, fresh in ((None, 6, v), (torch.arange(4), 0, v), (None, 5, v.float()), (None, 5, v[:, :2])):
    assert not serves_slots(keys, values, index, first, k, fresh)
assert not serves_slots(keys, values.transpose(2, 3).contiguous().transpose(2, 3), None, 5, k, v)
x, weight, rope = torch.randn(2, 3, 32), torch.ones(32), still[:3]
slots = torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)
for index, turns in ((None, rope), (torch.tensor([4, 0, 5]), None)):
    torch.library.opcheck(torch.ops.flowcache.write_normed_rotated, (*slots, index, 2, x, x, weight, 1e-6, turns))
for rope in (still[:3], None):
    torch.library.opcheck(torch.ops.flowcache.normed_rotated, (torch.randn(2, 3, 32), torch.ones(32), 1e-6, rope, 16))
print("agree")
"""

MODULATION = """
from flowcache_core.kernels import modulation_triton
from flowcache_core.kernels.modulation import gated, gated_in_pytorch, in_pytorch, normed_modulated

def laid_out(row, x):
    return row.double().repeat_interleave(x.shape[1] // row.shape[1], 1)

for films, rows, frames, tokens, width in ((1, 1, 1, 1, 1), (1, 1, 1, 7, 63), (2, 2, 1, 7, 64), (1, 1, 7, 7, 65), (2, 2, 3, 6, 129),
                                           (1, 1, 3, 129, 16)):
    for dtype in DTYPES if tokens < 64 else DTYPES[2:]:
        x, y = (3 * torch.randn(films, tokens, width + 5).to(dtype)[:, :, :width] for _ in range(2))
        shift, scale = torch.randn(rows, frames, 6, width).to(dtype).unbind(2)[:2]
        assert modulation_triton.serves(x, shift, scale)
        out = gated(x, y, scale)
        close(out, x.double() + y.double() * laid_out(scale, x), dtype)
        assert tokens > 9 or torch.equal(out, gated(x, y, scale))
        torch.testing.assert_close(out, gated_in_pytorch(x, y, scale), rtol=torch.finfo(dtype).eps, atol=1e-6)
        out = normed_modulated(x, shift, scale, 1e-6)
        normed = F.layer_norm(x.double(), (width,), eps=1e-6)
        close(out, normed * (1 + laid_out(scale, x)) + laid_out(shift, x), dtype)
        assert tokens > 9 or torch.equal(out, normed_modulated(x, shift, scale, 1e-6))
        loose = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(out, in_pytorch(x, shift, scale, 1e-6), rtol=loose, atol=loose)

row = torch.randn(1, 1, 16)
flat, large = torch.full((1, 3, 16), 7.0), 1e15 * torch.randn(1, 3, 16)
assert torch.equal(normed_modulated(flat, row, row, 1e-6), row.expand(1, 3, 16))
close(normed_modulated(large, row, row, 1e-6), F.layer_norm(large.double(), (16,), eps=1e-6) * (1 + row.double()) + row.double(), torch.float32)
x = far_apart(2, 3, 16)
row = row.half()
close(gated(x, x, row), x.double() * (1 + row.double()), torch.float16)
close(normed_modulated(x, row, row, 1e-6), F.layer_norm(x.double(), (16,), eps=1e-6) * (1 + row.double()) + row.double(), torch.float16)
assert not modulation_triton.serves(x, row.float())
assert not modulation_triton.serves(x, torch.randn(1, 2, 16).half())
x, row = torch.randn(2, 6, 16), torch.randn(1, 3, 16)
torch.library.opcheck(torch.ops.flowcache.gated, (x, x, row))
torch.library.opcheck(torch.ops.flowcache.normed_modulated, (x, row, row, 1e-6))
print("agree")
"""

CALLED = """
from flowcache_core.kernels import modulation, rotation
OPERATIONS = {rotation.OPERATION, modulation.MODULATION, modulation.GATE}
agree_on("smoke", (modulation, rotation), OPERATIONS)

from flowcache_core.models.attention import bidirectional
net = sized(GEOMETRIES["smoke"], 1, torch.float32, DEVICE).network
x, t, text = torch.randn(1, 16, 2, 4, 4), torch.tensor([[700.0, 0.0]]), net.text_kv(torch.randn(1, 4, 64))
torch.set_default_device(None)
whole = torch.compile(net, backend="aot_eager", fullgraph=True)
assert torch.equal(whole(x, t, text, bidirectional), net(x, t, text, bidirectional))
print("agree")
"""


@DEVICES
@pytest.mark.parametrize("script", [ROTATION, MODULATION, FILM + CALLED], ids=["rotation", "modulation", "film"])
def test_the_kernels_agree_with_pytorch(script: str, device: str) -> None:
    """Sizes of 1, 7, 63 to 65 and 129; strides; zeros; large numbers; more than 2^31 elements; twice the same; slots of a KV cache; films within a
    tolerance."""
    agrees(PREPARED + script, device)

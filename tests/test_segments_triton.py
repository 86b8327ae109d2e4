"""The Triton merge of segments against plain PyTorch, in Triton's interpreter, and on CUDA where there is a card."""

from __future__ import annotations

from tests.interpreted import DEVICES, NEEDS_TRITON, PREPARED, agrees

SCRIPT = """
from flowcache_core.kernels import segments_triton
from flowcache_core.kernels.segments import merge, merge_by_pytorch

for batch, heads, count, d, parts in ((1, 1, 1, 16, 2), (2, 1, 63, 64, 3), (1, 3, 65, 128, 4), (2, 2, 7, 32, 6), (1, 2, 129, 128, 5)):
    for dtype in (torch.float16, torch.bfloat16):
        made = [
            (torch.randn(batch, count, heads, d).to(dtype).transpose(1, 2), 100 * torch.randn(batch, heads, count)) for _ in range(parts)
        ]
        assert segments_triton.serves(made)
        merged, exact = merge(made), merge_by_pytorch([(out.double(), lse.double()) for out, lse in made])
        assert (merged.shape, merged.dtype, merged.stride()) == (made[0][0].shape, dtype, made[0][0].stride())
        torch.testing.assert_close(merged.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
one = made[0]
assert not segments_triton.serves([one]) and not segments_triton.serves([one] * 7)
assert not segments_triton.serves([one, (one[0].contiguous(), one[1])]) and not segments_triton.serves([(out.float(), lse) for out, lse in made])
print("agree")
"""


@NEEDS_TRITON
@DEVICES
def test_the_triton_merge_agrees_with_pytorch(device: str) -> None:
    agrees(PREPARED + SCRIPT, device)

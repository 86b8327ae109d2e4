"""Rescaling polynomials of the time signature that were published for SkyReels-V2 networks. It knows sizes, no weights.

FlowCache on SkyReels-V2 (ICLR 2026, section 3) takes over the polynomials that TeaCache (CVPR 2025, section 3.3) fitted to
Wan 2.1: they map the relative change of the time modulation to the expected relative change of the output.
"""

from __future__ import annotations

POLYNOMIALS: dict[tuple[int, int], tuple[float, ...]] = {
    (1536, 30): (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
    (5120, 40): (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),
}
"""(width, layers) of a SkyReels-V2 network -> coefficients, highest power first. The first is 1.3B, the second 14B."""

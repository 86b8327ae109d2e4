"""Colours of previews: what the host shows of latents while they are denoised has the colours of the film."""

from __future__ import annotations

import pytest
import torch

from flowcache_core.models import FAMILIES
from flowcache_core.models.bundle import load_bundle
from flowcache_core.models.family import Family
from flowcache_core.training.preview import CLIPS, cells
from flowcache_core.training.scenes import make_scene


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.bundled], ids=lambda family: family.name)
def test_previews_of_bundled_models_have_the_film_s_colours(family: Family) -> None:
    """Of a clip that they were not fitted to: most of what red, green and blue vary by is in the preview."""
    preview = (family.bundled and family.bundled.preview) or family.latents.preview
    assert preview is not None, "the host's colours are those of another VAE"
    latents, wanted = cells(load_bundle(family=family).vae, make_scene(CLIPS + 100, size=64), family.frames)
    shown = latents @ torch.tensor(preview.factors) + torch.tensor(preview.bias)
    errors, spreads = (shown - wanted).square().mean(0), wanted.var(0)
    assert (errors < 0.25 * spreads).all(), (errors, spreads)

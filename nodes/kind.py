"""Of which kind latents are: as the nodes of this pack mark them, and as a VAE makes them. Those of two families may have the same shape."""

from __future__ import annotations

from typing import Any

from ..flowcache_core import models
from ..flowcache_core.models.family import Family
from .vae_pieces import frames_by

KIND = "flowcache_family"
"""Key of a LATENT: the name of the family that it is for. Nodes of the host hand it on with the latents."""
SOME = (1, 2, 5)
"""Numbers of latent frames by which ways of counting are told apart."""


def kind_of(family: Family) -> dict[str, str]:
    """What marks a LATENT."""
    return {KIND: family.name}


def family_of(latent: dict[str, Any]) -> Family | None:
    return next((family for family in models.FAMILIES if family.name == latent.get(KIND)), None)


def require_kind(latent: dict[str, Any], family: Family, node: str) -> None:
    """Raises ValueError for latents that were made for a family with another VAE."""
    other = family_of(latent)
    if other is not None and other.loaders.vae != family.loaders.vae:
        raise ValueError(
            f"{node}: these latents are of {other.title}, and the model is {family.title}, which has another VAE: use one family throughout"
        )


def require_vae(vae: Any, family: Family, node: str) -> None:
    """Raises ValueError for a VAE that counts frames in another way than the family's."""
    made, wanted = [frames_by(vae)(count) for count in SOME], [family.frames.pixel(count) for count in SOME]
    if made != wanted:
        raise ValueError(
            f"{node}: this VAE makes {made[-1]} frames of {SOME[-1]} latent frames, and that of {family.title} makes {wanted[-1]}: "
            f"use {family.loaders.vae}, or the bundled model's own"
        )


def require_vae_of(latent: dict[str, Any], vae: Any, node: str) -> None:
    """The same for latents that are marked."""
    if (family := family_of(latent)) is not None:
        require_vae(vae, family, node)

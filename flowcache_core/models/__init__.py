"""Families of networks. To add one: a file for the network, one for its adapter, one that describes the family, and its name in FAMILIES."""

from .causal_wan_family import CAUSAL
from .magi_family import MAGI, MAGI_DISTILLED
from .skyreels_family import SKYREELS

FAMILIES = (SKYREELS, MAGI, MAGI_DISTILLED, *CAUSAL)

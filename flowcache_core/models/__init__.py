"""Networks and their adapters. To add one: a file for the network, one for its adapter, and the adapter's name in ADAPTERS."""

from .skyreels_adapter import SkyReelsAdapter

ADAPTERS = (SkyReelsAdapter,)

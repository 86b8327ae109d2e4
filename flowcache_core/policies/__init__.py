"""Cache policies. To add one: a file with a frozen dataclass that fulfils `CachePolicy`, and its name in POLICIES.

Whatever is in POLICIES can be chosen by its `name` in the Cache Policy node, in the demo, and in a bench (`named.py`).
"""

from .always import Always
from .chunkwise import Chunkwise
from .motion import Motion, Released
from .multirate import Multirate
from .planned import Planned
from .protocol import CachePolicy
from .target import Target

POLICIES: tuple[type[CachePolicy], ...] = (Always, Planned, Chunkwise, Target, Motion, Multirate)
OF_PRESETS: tuple[type[CachePolicy], ...] = (Released,)
"""Kinds that presets have and nobody chooses by name."""

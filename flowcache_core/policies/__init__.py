"""Cache policies. To add one: a file with a frozen dataclass that has `decide`, and its name in POLICIES."""

from .always import Always
from .chunkwise import Chunkwise
from .motion import Motion
from .target import Target

POLICIES = (Always, Chunkwise, Target, Motion)

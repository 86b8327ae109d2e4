"""Cache policies. To add one: a file with a frozen dataclass that has `decide`, and its name in POLICIES."""

from .always import Always
from .chunkwise import Chunkwise
from .motion import Motion
from .multirate import Multirate
from .planned import Planned
from .target import Target

POLICIES = (Always, Planned, Chunkwise, Target, Motion, Multirate)

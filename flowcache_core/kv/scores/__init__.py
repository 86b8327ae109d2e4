"""Scores that say which slots of the KV cache are kept. To add one: a file with a frozen dataclass that has `score`, and its name in KV_POLICIES."""

from ..policy import KVPolicy
from .even import Even
from .expected import ExpectedAttention
from .h2o import H2O
from .importance import ImportanceRedundancy
from .key_norm import KeyNorm
from .keydiff import KeyDiff
from .r_kv import RKV
from .random import Random
from .salience import Salience
from .snapkv import SnapKV
from .streaming import StreamingLLM

KV_POLICIES: tuple[type[KVPolicy], ...] = (
    ImportanceRedundancy,
    RKV,
    SnapKV,
    H2O,
    StreamingLLM,
    KeyDiff,
    KeyNorm,
    ExpectedAttention,
    Salience,
    Random,
    Even,
)

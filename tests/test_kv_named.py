"""KV policies and their settings in words."""

from __future__ import annotations

import pytest

from flowcache_core.kv.named import policy_named
from flowcache_core.kv.scores import KV_POLICIES
from flowcache_core.kv.scores.h2o import H2O
from flowcache_core.kv.scores.importance import ImportanceRedundancy
from flowcache_core.kv.scores.salience import Salience
from flowcache_core.kv.scores.snapkv import SnapKV
from flowcache_core.settings import settings_of


@pytest.mark.parametrize("kind", KV_POLICIES, ids=lambda kind: kind.name)
def test_a_name_alone_is_the_policy_as_it_is_and_its_own_settings_written_out_change_nothing(kind: type) -> None:
    assert policy_named(kind.name) == kind()
    written = ", ".join(f"{name}={default}" for name, default in settings_of(kind).items())
    assert policy_named(kind.name, written) == kind()


@pytest.mark.parametrize("settings", ["lam=0.5 queries=chunk", "lam=0.5,queries=chunk", " lam=.5 ,  queries=chunk\n"])
def test_settings_are_read_with_spaces_or_commas_between(settings: str) -> None:
    assert policy_named("importance-redundancy", settings) == ImportanceRedundancy(lam=0.5, queries="chunk")


def test_whole_numbers_stay_whole() -> None:
    assert policy_named("snapkv", "window=32") == SnapKV(window=32)


def test_a_head_is_for_salience_alone() -> None:
    assert policy_named("salience", "low=2", "head.safetensors") == Salience("head.safetensors", low=2.0)
    assert policy_named("h2o", head="head.safetensors") == H2O()


@pytest.mark.parametrize(("name", "settings", "said"), [
    ("best", "", "no KV policy is called 'best': there are importance-redundancy, r-kv"),
    ("h2o", "lam=1", "h2o has no setting 'lam': it has none, leave the settings empty"),
    ("snapkv", "windows=3", "snapkv has no setting 'windows': it has window=64, kernel=5"),
    ("snapkv", "window 3", "'window' is no setting: write name=value, without spaces around the ="),
    ("snapkv", "window=3.5", "window is '3.5': it must be a whole number, such as 64"),
    ("even", "stands_for=many", "stands_for is 'many': it must be a number, such as 4.0"),
    ("snapkv", "kernel=4", "kernel is 4: a token is in the middle of an odd number only"),
    ("importance-redundancy", "queries=film", "queries is 'film': use one of token, frame, chunk"),
    ("salience", "path=/etc/passwd", "salience has no setting 'path'"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_with_what_can(name: str, settings: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        policy_named(name, settings)

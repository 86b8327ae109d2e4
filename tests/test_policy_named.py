"""Cache policies and their settings in words: by name, as arms of the demo, as arms of the frontier."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from flowcache_core.__main__ import main
from flowcache_core.bench import frontier
from flowcache_core.bench.frontier import BIDIRECTIONAL, CAUSAL_ARMS, Film, Setting, run_arm
from flowcache_core.models.bundle import Bundle
from flowcache_core.policies.always import Always
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.named import in_words, policy_named
from flowcache_core.policies.planned import Planned
from flowcache_core.settings import read_settings, setting
from tests.test_bench_frontier import arguments


@pytest.mark.parametrize("settings", ["threshold=0.2 order=0", "threshold=0.2,order=0", " threshold=.2 ,  order=0\n"])
def test_settings_are_read_with_spaces_or_commas_between(settings: str) -> None:
    assert policy_named("threshold", settings) == Chunkwise(threshold=0.2, order=0)


@pytest.mark.parametrize(("name", "settings", "said"), [
    ("best", "", "no cache policy is called 'best': there are always, planned, "),
    ("always", "share=1", "always has no setting 'share': it has none, leave the settings empty"),
    ("planned", "shares=0.3", "planned has no setting 'shares': it has share=0.4, seconds=0.0"),
    ("planned", "share 0.3", "'share' is no setting: write name=value, without spaces around the ="),
    ("planned", "share=half", "share is 'half': it must be a number, such as 0.4"),
    ("planned", "share=2", "share is 2.0: it must lie between 0.01 and 1.0"),
    ("planned", "exact=1", "planned has no setting 'exact'"),
    ("threshold", "max_reuse=2.5", "max_reuse is '2.5': it must be a whole number, such as 8"),
    ("threshold", "signature=sound", "signature is 'sound': use one of latent, time"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_with_what_can(name: str, settings: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        policy_named(name, settings)


@dataclass(frozen=True)
class Switched:
    name: ClassVar[str] = "switched"

    on: bool = setting(False, "Whether it is on.")


def test_true_and_false_are_read_as_what_they_say() -> None:
    assert [read_settings(Switched, f"on={word}") for word in ("true", "False")] == [{"on": True}, {"on": False}]
    with pytest.raises(ValueError, match="on is 'yes': it must be true or false"):
        read_settings(Switched, "on=yes")


def test_a_policy_says_what_it_is_called_and_what_its_settings_do() -> None:
    assert in_words(Always()) == ("No Cache",)
    assert in_words(Planned(share=0.3))[:2] == (
        "Chunkwise Cache by a plan",
        "share=0.3: The share of all network tokens that is computed; 1 computes every step.",
    )


# the demo


def test_the_demo_takes_a_policy_with_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arms = "uncached,planned share=0.5"
    monkeypatch.setattr(sys, "argv", ["flowcache_core", "demo", "--frames", "9", "--steps", "4", "--arms", arms, "--out", str(tmp_path)])
    assert main() == 0
    assert (tmp_path / "planned_share=0.5.mp4").exists()
    head, *rows = capsys.readouterr().out.splitlines()[:3]
    assert head.split()[:2] == ["arm", "seconds"]
    assert len({len(line) for line in (head, *rows)}) == 1, "a long name leaves the columns under one another"


@pytest.mark.parametrize(("arms", "said"), [
    ("chunkwise threshold=1", "no cache policy is called 'chunkwise'"),
    ("uncached,planned shares=1", "planned has no setting 'shares'"),
    ("magic", "there is no arm magic: choose from upstream, uncached, chunkwise, motion, or a cache policy, always, "),
])  # fmt: skip
def test_the_demo_refuses_before_it_writes(
    arms: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["flowcache_core", "demo", "--arms", arms, "--out", str(tmp_path / "out")])
    assert main() == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# the frontier


def test_a_policy_that_has_a_share_is_an_arm_on_request_where_its_attention_allows_it() -> None:
    assert {"planned", "target", "motion-plan"} <= set(frontier.BY_NAME)
    assert not {arm for film in frontier.films(arguments()) for arm in film.arms} & set(frontier.BY_NAME)
    asked = frontier.films(arguments("--arms", "steps,planned,motion-plan", "--prompts", "5"))
    for film in asked:
        assert set(film.arms) == {"steps", "planned"} | ({"motion-plan"} if film.setting.attention != BIDIRECTIONAL else set())
    with pytest.raises(ValueError, match=r"no arm is called always: there are steps, .*, and on request planned, "):
        frontier.films(arguments("--arms", "always"))


@pytest.mark.parametrize(("name", "arm"), [("planned", "default"), ("motion-plan", "motion")])
def test_by_its_name_it_makes_the_film_of_the_arm_that_is_that_policy(bundle: Bundle, name: str, arm: str) -> None:
    film = Film(Setting(frames=21, steps=10, ar_step=1, cfg=1.0), "red circle moves right", 3, CAUSAL_ARMS, (0.5,))
    assert torch.equal(run_arm(bundle, film, name, 0.5)[0], run_arm(bundle, film, arm, 0.5)[0])


def test_a_share_out_of_reach_is_refused_before_any_film_is_made() -> None:
    with pytest.raises(ValueError, match="a computed share of 12% cannot be reached"):
        frontier.run(arguments("--grid", "usual", "--prompts", "1", "--arms", "target", "--shares", "0.12"))


def test_what_has_a_share_of_all_tokens_is_given_it_exactly(bundle: Bundle) -> None:
    film = Film(Setting(frames=33), "", 0, (), ())
    policy = frontier.by_name(bundle, film, "motion-plan", 0.3)
    assert isinstance(policy, Multirate)
    assert policy.share == frontier.by_name(bundle, film, "planned", 0.3).share  # type: ignore[attr-defined]
    assert 0.3 <= policy.share < 0.33

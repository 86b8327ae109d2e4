"""The seam bench: what it measures, and its rows from a network of random weights."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowcache_core.__main__ import main
from flowcache_core.bench import seam
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.models.wan_vae import WanVAE
from flowcache_core.run.generate import Given, Job, decode, generate

JOB = Job("red circle", frames=33, steps=2, size=16, cfg=1, ar_step=1)


@pytest.fixture
def bundle(net: SkyReelsV2) -> Bundle:
    torch.manual_seed(3)
    return Bundle(SKYREELS, net, WanVAE(4).eval(), replace(SKYREELS.layout, chunk_frames=3, window=3))


def test_jumps_are_grey_levels_at_the_seam_and_inside() -> None:
    ramp = torch.arange(18.0).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 255
    assert seam.jumps(ramp[:9], ramp[9:17], SKYREELS.frames) == pytest.approx((1, 1, 1), abs=1e-3)
    assert seam.jumps(ramp[:9], ramp[9:17] + 4 / 255, SKYREELS.frames) == pytest.approx((5, 1, 1), abs=1e-3)


def test_latent_boundaries_are_every_fourth_pair() -> None:
    """A film whose latent frames are constant changes at their boundaries only."""
    level = torch.tensor([0.0, *[1.0] * 4, *[2.0] * 4, *[3.0] * 4, *[4.0] * 4])
    film = level.view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 255
    at_seam, ordinary, boundary = seam.jumps(film[:9], film[9:], SKYREELS.frames)
    assert (at_seam, boundary) == pytest.approx((1, 1), abs=1e-3)
    assert ordinary == pytest.approx(3 / 15, abs=1e-3)


def test_every_rule_gives_a_row_of_the_common_form(bundle: Bundle) -> None:
    rows = seam.measure(bundle, [JOB], list(seam.RULES))
    assert [(r["rule"], r["setting"]) for r in rows] == [(r.rule, r.frames or 33) for r in seam.RULES]
    for row in rows:
        assert list(row) == ["rule", "setting", "share", "psnr", "ssim", "wall_ratio", "seam", "ordinary", "boundary"]
        assert row["share"] is row["psnr"] is row["ssim"] is row["wall_ratio"] is None
        assert 0 < row["ordinary"] < 255
        assert 0 < row["seam"] < 255


def test_every_rule_joins_the_clip_with_frames_of_its_own(bundle: Bundle) -> None:
    clip, _ = generate(bundle, JOB)
    film = decode(bundle, clip)
    for rule in seam.RULES:
        before, after = rule.extend(bundle, JOB, clip, film)
        torch.testing.assert_close(before, film, rtol=1e-4, atol=1e-4)
        assert len(after) == (36 if rule.rule == "rolled" else 33 - rule.frames)


def test_what_is_given_decides_how_the_film_goes_on(bundle: Bundle) -> None:
    clips = [generate(bundle, Job("red circle", 33, 2, seed, size=16, cfg=1, ar_step=1))[0] for seed in (1, 2)]
    first, second = (generate(bundle, JOB, given=Given(start=clip[:, :, -5:]))[0][:, :, 5:] for clip in clips)
    assert not torch.allclose(first, second)


def test_the_command_writes_rows_and_no_plot_of_what_has_no_meaning(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = seam.measure
    monkeypatch.setattr(seam, "load_bundle", lambda dtype: bundle)
    monkeypatch.setattr(seam, "measure", lambda bundle, jobs, rules: real(bundle, [replace(JOB, prompt=j.prompt) for j in jobs], rules))
    out = tmp_path / "new" / "seam.json"
    monkeypatch.setattr(sys, "argv", ["flowcache_core", "bench", "seam", "--prompts", "1", "--steps", "2", "--rules", "rolled", "--json", str(out)])
    assert main() == 0
    result = json.loads(out.read_text())
    assert (result["bench"], result["prompts"], [r["rule"] for r in result["rows"]]) == ("seam", 1, ["rolled"])
    assert [path.name for path in out.parent.iterdir()] == ["seam.json"]


@pytest.mark.parametrize(
    ("given", "sentence"), [({"prompts": 0}, "0 prompts were asked for"), ({"rules": "glue"}, "no rule is called glue: there are rolled,")]
)
def test_the_bench_refuses_before_it_runs(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        seam.run(argparse.Namespace(**{"prompts": 1, "steps": 2, "rules": "", **given}))

"""`render`: the films of a jobs file, in this process; what is refused, what fails alone, and what is not made again."""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flowcache_core import __main__ as command_line
from flowcache_core.fleet import renderer
from flowcache_core.fleet.estimate import cost_of, kinds_of
from flowcache_core.fleet.film_line import KNOWN, FilmLines
from flowcache_core.fleet.jobs_file import read_tasks
from flowcache_core.fleet.tasks import Failed, Made
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.scores import Even
from flowcache_core.models.bundle import NETWORK, VAE, Bundle
from flowcache_core.policies.planned import Planned
from flowcache_core.run.generate import Job, decode, generate
from flowcache_core.run.identity import digest
from flowcache_core.show.film import frames_of
from tests.films import read_film
from tests.killed import full_disk

pytestmark = pytest.mark.skipif(not (NETWORK.exists() and VAE.exists()), reason="the bundled weights are not in flowcache_core/models/weights")

SMALL = {"frames": 21, "steps": 3, "size": 32, "ar_step": 3}
FILMS = [
    {"prompt": "red circle moves right", "seed": 1, **SMALL, "policy": "planned share=0.7"},
    {"prompt": "blue square", "seed": 2, **SMALL, "name": "The blue one", "history": {"policy": "even", "budget": 1.5}},
]
POISON = {"prompt": "more than any memory", **SMALL, "size": 16, "width": 1 << 40}
Cli = Callable[..., int]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["flowcache_core", "render", *map(str, arguments)])
        return command_line.main()

    return run


def jobs(folder: Path, *lines: Any) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())  # type: ignore[no-any-return]


def test_films_are_those_that_are_made_in_one_process_bit_for_bit(cli: Cli, tmp_path: Path, bundle: Bundle) -> None:
    out = tmp_path / "out"
    assert cli(jobs(tmp_path, *FILMS), "--out", out, "--here", "--dtype", "float32") == 0
    one, other = manifest(out)["films"]
    job = Job.usual(bundle.family, "red circle moves right", seed=1, **SMALL)
    latents, _ = generate(bundle, job, Planned(share=0.7))
    again, _ = generate(bundle, Job.usual(bundle.family, "blue square", seed=2, **SMALL), compressor=Compressor(Even(), 1.5))
    for entry, film in ((one, latents), (other, again)):
        report = json.loads((out / entry["report"]).read_text())
        assert (report["latents"], report["frames"]) == (digest(film), digest(torch.from_numpy(frames_of(decode(bundle, film)))))
        assert read_film(out / entry["films"][0]).shape == (21, 32, 32, 3)
        assert report["run"]["tokens_computed"] == (6 * 2 + 3 if entry is one else 6 * 3 + 3) * 4, "latent frames of which an estimate is made"
    assert (one["line"], one["state"], one["tries"], one["asked"]) == (1, "made", 1, FILMS[0])
    assert one["films"][0].startswith("red-circle-moves-right-")
    assert other["films"][0].startswith("the-blue-one-")
    assert {path.name for path in out.iterdir()} == {"manifest.json", *one["films"], one["report"], *other["films"], other["report"]}


def test_what_is_made_is_not_made_again_and_what_is_missing_is(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(renderer, "generate", lambda bundle, job, *a, **kw: (made.append(job.prompt), generate(bundle, job, *a, **kw))[1])
    out, arguments = tmp_path / "out", ("--here", "--dtype", "float32")
    path = jobs(tmp_path, *FILMS)
    assert cli(path, "--out", out, *arguments) == 0
    before = manifest(out)["films"]
    assert cli(path, "--out", out, *arguments) == 0
    assert made == ["red circle moves right", "blue square"]
    assert manifest(out)["films"] == before

    (out / before[0]["films"][0]).unlink()
    (out / "manifest.json").write_text("{ damaged")
    third = {**FILMS[1], "seed": 3}
    assert cli(jobs(tmp_path, third, *FILMS), "--out", out, *arguments) == 0
    assert made[2:] == ["blue square", "red circle moves right"], "another seed is another film, and the order of lines is none of it"
    assert [entry["state"] for entry in manifest(out)["films"]] == ["made"] * 3


def test_a_film_that_cannot_be_made_fails_alone_and_is_named(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli(jobs(tmp_path, POISON, FILMS[0]), "--out", out, "--here", "--dtype", "float32") == 1
    poisoned, good = manifest(out)["films"]
    assert (poisoned["state"], good["state"]) == ("failed", "made")
    assert "memory" in poisoned["why"]
    printed = capsys.readouterr()
    assert "line 1 failed: " in printed.out
    assert "1 of 2 films" in printed.out


def test_a_full_disk_ends_in_a_sentence_and_the_next_command_goes_on(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, path = tmp_path / "out", jobs(tmp_path, *FILMS)
    with full_disk():
        assert cli(path, "--out", out, "--here", "--dtype", "float32") == 2
    assert "flowcache: the system refuses" in (printed := capsys.readouterr().err)
    assert "free space on the disk" in printed
    assert not list(out.glob("*.mp4"))
    assert cli(path, "--out", out, "--here", "--dtype", "float32") == 0
    assert [entry["state"] for entry in manifest(out)["films"]] == ["made"] * 2


def test_films_go_to_any_url_that_fsspec_knows(cli: Cli, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    url = f"memory://{tmp_path.name}/films"
    assert cli(jobs(tmp_path, FILMS[0]), "--out", url, "--here", "--dtype", "float32") == 0
    assert cli(jobs(tmp_path, FILMS[0]), "--out", url, "--here", "--dtype", "float32") == 0
    system, root = fsspec.core.url_to_fs(url)
    (entry,) = json.loads(system.cat_file(f"{root}/manifest.json"))["films"]
    assert entry["seconds"] > 0
    assert {name.rsplit("/", 1)[-1] for name in system.ls(root, detail=False)} == {"manifest.json", *entry["films"], entry["report"]}


def test_a_dry_run_makes_nothing_and_says_how_long_it_takes(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jobs(tmp_path, *FILMS, {**FILMS[0], "seed": 9, "policy": "threshold"})
    assert cli(path, "--out", tmp_path / "out", "--here", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "3 films to make: " in printed
    assert "1 films decide while they are made" in printed
    assert not (tmp_path / "out").exists()


def test_a_plan_costs_what_it_computes(tmp_path: Path) -> None:
    lines = FilmLines(torch.float32)
    policies = "uncached", "planned share=0.7", "planned seconds=0.001"
    tasks = read_tasks(jobs(tmp_path, *({**FILMS[0], "policy": policy} for policy in policies)), lines.task)
    bundle, pace = lines.bundle_of(tasks[0].model), renderer.Pace(1.0, 0.1)
    full, planned, timed = (cost_of(bundle, task, pace) for task in tasks)
    assert full.computed == 6 * 3 + 3, "three steps of six latent frames in two chunks, and the clean pass of the first"
    assert planned.computed == 6 * 2 + 3
    assert timed.computed == pytest.approx(0.001)
    assert full.seconds(pace) == pytest.approx(21 + 0.6)
    assert len(kinds_of(tasks)) == 1


REFUSED: dict[str, str] = {
    '{"prompt": "a"': "line 2: it is no JSON (Expecting ',' delimiter in line 1, column 15)",
    '["a"]': 'line 2: it is ["a"], and a film is an object',
    "{}": "line 2: it has no prompt",
    '{"prompt": "a", "step": 3}': "line 2: a film has no setting step: there are prompt, frames, steps, ",
    '{"prompt": 3}': "line 2: prompt is 3: it must be a text in double quotes",
    '{"prompt": "a", "steps": 2.5}': "line 2: steps is 2.5: it must be a whole number",
    '{"prompt": "a", "steps": true}': "line 2: steps is True: it must be a whole number",
    '{"prompt": "a", "cfg": NaN}': "line 2: cfg is nan: it must be a number",
    '{"prompt": "a", "seed": -1}': "line 2: seed is -1: it must lie between 0 and",
    '{"prompt": "a", "frames": 58}': "line 2: 58 frames are not 4n + 1: use 57 or 61",
    '{"prompt": "a", "frames": 57, "seconds": 1}': "line 2: it has frames and seconds",
    '{"prompt": "a", "seconds": 0}': "line 2: seconds is 0: it must be above 0",
    '{"prompt": "a", "size": 100}': "line 2: a picture of 100 pixels does not fit",
    '{"prompt": "a", "model": "wan"}': "line 2: there is no model wan: there are tiny-skyreels",
    '{"prompt": "a", "policy": "teacache"}': "line 2: no cache policy is called 'teacache'",
    '{"prompt": "a", "policy": "planned share=2"}': "line 2: share is 2.0: it must lie between",
    '{"prompt": "a", "solver": "magic"}': "line 2: ",
    '{"prompt": "a", "shift": 0}': "line 2: ",
    '{"prompt": "a", "size": 1000000000000000000000000000000}': "are more than any memory holds",
    '{"prompt": "a", "history": 3}': "line 2: history is 3: it must be an object",
    '{"prompt": "a", "history": {"budgets": 3}}': "line 2: history has no setting budgets",
    '{"prompt": "a", "history": {"budget": 0.1}}': "line 2: a budget of 0.1 chunks is",
    '{"workflow": "text_to_video"}': "line 2: it names a workflow, and those are run by ComfyUI servers: add --host URL",
    json.dumps(FILMS[0]): "line 2: it makes the same film as line 1",
}


def test_a_film_that_is_lost_in_decoding_goes_on_from_its_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = FilmLines(torch.float32).task(1, FILMS[0])
    one, whole = renderer.Renderer("float32", states=f"{tmp_path}"), renderer.Renderer("float32").render(task)
    assert isinstance(whole, Made)
    with monkeypatch.context() as lost:
        lost.setattr(renderer, "decode", lambda bundle, latents: 1 // 0)
        assert isinstance(one.render(task), Failed)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1
    again = one.render(task)
    assert isinstance(again, Made)
    assert any("goes on from a saved state: 1 of 2 chunks" in note for note in again.report["run"]["notes"])
    assert again.report["latents"] == whole.report["latents"]
    assert not list(tmp_path.iterdir())


VALUES: tuple[Any, ...] = (
    0, -1, 2, 57, 10**9, 10**30, -(10**30), 0.5, 1e308, -1e308, 1e-320, float("nan"), float("inf"), True, None, "", "x", "\x00", "a" * 5000, "euler",
    "planned share=0.5", "threshold", "balanced", "motion-plan", "tiny-magi", [], {}, {"policy": "even", "budget": 2}, {"policy": "h2o x=1"},
)  # fmt: skip


def test_any_line_is_taken_or_refused_with_a_sentence() -> None:
    lines, draw = FilmLines(torch.float32), random.Random(0)
    for number in range(300):
        asked = {"prompt": "a", **{name: draw.choice(VALUES) for name in draw.sample(KNOWN, draw.randint(1, 4))}}
        with contextlib.suppress(ValueError):
            assert lines.task(number, json.loads(json.dumps(asked))).line == number


def test_a_prompt_may_be_longer_than_the_name_of_a_file(cli: Cli, tmp_path: Path) -> None:
    assert cli(jobs(tmp_path, {**FILMS[0], "prompt": "red circle " * 100}), "--out", tmp_path / "out", "--here", "--dtype", "float32") == 0


@pytest.mark.parametrize("line", REFUSED)
def test_a_line_that_cannot_be_made_is_refused_by_its_number(line: str, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(jobs(tmp_path, FILMS[0], line), "--out", tmp_path / "out", "--here", "--dtype", "float32") == 2
    printed = capsys.readouterr().err
    assert printed.startswith("flowcache: jobs.jsonl, ")
    assert REFUSED[line] in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--out", "{}/jobs.jsonl", "--here"), "is a file: name a folder"),
        (("--out", "nowhere://films", "--here"), "films cannot be written to nowhere://films"),
        (("--out", "{}/out", "--ray", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
        (("--out", "{}/out", "--here", "--ray", "auto"), "leave --ray and --workers out"),
        (("--out", "{}/out", "--tries", "0"), "--tries is 0: use 1 or more"),
        (("--out", "{}/out", "--host", "http://127.0.0.1:1"), "line 1: it names no workflow"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_a_worker_starts(
    arguments: tuple[str, ...], sentence: str, cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(jobs(tmp_path, FILMS[0]), *(one.format(tmp_path) for one in arguments)) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_ray_a_sentence_says_what_to_do(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli(jobs(tmp_path, FILMS[0]), "--out", tmp_path / "out") == 2
    assert "pip install 'flowcache[fleet]', or add --here" in capsys.readouterr().err


def test_a_jobs_file_that_is_none_is_refused(cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("none", None), ("empty", b"\n\n"), ("picture", b"\xff\xd8")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert cli(tmp_path / name, "--out", tmp_path / "out", "--here") == 2
        assert {"none": "there is no jobs file", "empty": "has no line", "picture": "is no text in UTF-8"}[name] in capsys.readouterr().err

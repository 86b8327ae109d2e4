"""The live panel and the console, without a host: whoever looks at a run may go away, and a clock may jump."""

from __future__ import annotations

import re
import sys
import weakref
from base64 import b64decode
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.hostless import Server, core

RUN = SimpleNamespace(steps=4, chunks=1, budget=None, rows=tuple((SimpleNamespace(index=0, step=step),) for step in range(4)))
"""One chunk of four steps, as far as those who look at a run know it."""


def report(nodes: Callable[[str], Any], steps: int = 4) -> Any:
    return core("run.report").RunReport(1, steps)


@pytest.mark.parametrize("gone", [RuntimeError("Event loop is closed"), ConnectionResetError(), AttributeError("loop")])
def test_a_page_that_cannot_be_reached_ends_no_run(gone: Exception, nodes: Callable[[str], Any], server: Server) -> None:
    server.gone = gone
    live = nodes("live").LivePanel(nodes("page").Page("7"), RUN)
    for done in range(5):
        live.show(report(nodes), done)
    server.gone = None
    live.show(report(nodes), 4)
    assert len(server.sent) == 1, "and one that comes back gets it again"


def test_without_a_page_or_a_server_nothing_is_sent(nodes: Callable[[str], Any], server: Server) -> None:
    live = nodes("live")
    live.LivePanel(nodes("page").Page(None), RUN).show(report(nodes), 0)
    sys.modules["server"].PromptServer.instance = None  # type: ignore[attr-defined]
    live.LivePanel(nodes("page").Page("7"), RUN).show(report(nodes), 0)
    assert not server.sent


def test_the_drift_of_the_chunks_under_way_is_shown(nodes: Callable[[str], Any], server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes("live"), "PAUSE_S", 0)
    rows = ((SimpleNamespace(index=0, step=0),), (SimpleNamespace(index=0, step=1), SimpleNamespace(index=1, step=0)))
    live = nodes("live").LivePanel(nodes("page").Page("7"), SimpleNamespace(steps=4, chunks=2, budget=None, rows=rows))
    one = core("run.report").RunReport(2, 2)
    live.show(one, 0)
    for done, (chunk, drift) in enumerate([(rows[0][0], 0.0), (rows[1][0], 0.04), (rows[1][1], 0.125)], 1):
        one.map[chunk.index, chunk.step], one.drift[chunk.index, chunk.step] = 1, drift
        live.show(one, done, chunk)
    live.end(one)
    assert [sent["drift"] for sent in server.sent] == ["", "", "drift of chunk 1: 0.04", "drift of chunks 1 to 2: 0.04 0.12", ""]


def test_no_more_than_ten_messages_go_out_in_a_second(nodes: Callable[[str], Any], server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 64 chunk-steps a second, for five seconds: besides the first two and the last."""
    steps, now = 320, [100.0]
    rows = tuple((SimpleNamespace(index=0, step=step),) for step in range(steps))
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    live = nodes("live").LivePanel(nodes("page").Page("7"), SimpleNamespace(steps=steps, chunks=1, budget=None, rows=rows))
    one, times = report(nodes, steps), list[float]()
    live.show(one, 0)
    for done, (chunk,) in enumerate(rows, 1):
        now[0] += 1 / 64
        before = len(server.sent)
        live.show(one, done, chunk)
        times += [now[0]] * (len(server.sent) - before)
    assert 40 <= len(times) <= 52
    assert all(sum(begin <= time < begin + 1 for time in times) <= 11 for begin in times)


def test_history_is_shown_against_its_budget(nodes: Callable[[str], Any], server: Server) -> None:
    run = SimpleNamespace(steps=4, chunks=1, budget=SimpleNamespace(slots=192), rows=RUN.rows)
    one = report(nodes)
    live = nodes("live").LivePanel(nodes("page").Page("7"), run)
    live.show(one, 0)
    one.history.frames.append(np.array([96.0, 48.0]))
    one.history.bytes.append(3 * 2**20)
    live.show(one, 4)
    assert [sent["kept"] for sent in server.sent] == [None, 0.75]
    assert server.sent[-1]["memory"] == "history: 144 of 192 tokens per layer, 3.0 MiB"


@pytest.mark.parametrize(
    "times", [[100.0], [1e6, 1e6 - 5, 0.0, 3.0, -1e9, 0.0], [0.0, 1e12, 2e12, 3e12, 4e12, 5e12]], ids=["stands", "backwards", "leaps"]
)
def test_the_time_left_is_never_negative_and_the_map_goes_on(
    times: list[float], nodes: Callable[[str], Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([*times, *[times[-1]] * 50])
    module = nodes("live")
    monkeypatch.setattr("time.perf_counter", lambda: next(calls))
    live, one = module.LivePanel(nodes("page").Page("7"), RUN), report(nodes)
    for done in range(5):
        live.show(one, done)
    assert all(re.fullmatch(r"|\d+ s left|\d+ min \d+ s left", sent["left"]) for sent in server.sent)
    assert server.sent[-1]["left"] == "0 s left"
    assert len(server.sent) >= 3, "the first two and the last are always sent"


def test_a_page_that_was_loaded_during_a_run_gets_all_of_it(nodes: Callable[[str], Any], server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    latest, chunks = nodes("latest_runs"), 3
    monkeypatch.setattr(nodes("live"), "PAUSE_S", 0)
    item = (0, "prompt", {}, {"extra_pnginfo": {"workflow": {"id": "mine"}}}, [], {})
    server.prompt_queue = SimpleNamespace(get_current_queue_volatile=lambda: ([item], []))  # type: ignore[attr-defined]
    rows = tuple((SimpleNamespace(index=k, step=step),) for k in range(chunks) for step in range(4))
    run = SimpleNamespace(steps=12, chunks=chunks, budget=None, rows=rows)
    live = nodes("live").LivePanel(nodes("page").Page("7"), run)
    one = core("run.report").RunReport(chunks, 4)
    live.show(one, 0)
    for done, (chunk,) in enumerate(rows, 1):
        one.map[chunk.index, chunk.step] = 2
        live.show(one, done, chunk)
    assert len(server.sent[-1]["map"]) == 1, "what is sent has what has changed"
    (known,) = latest.LATEST.of("mine")
    assert known["map"] == {"0": "2222", "1": "2222", "2": "2222"}
    assert (known["whole"], known["number"], known["ended"]) == (True, server.sent[-1]["number"], False)
    assert not latest.LATEST.of("another")
    live.stop()
    assert latest.LATEST.of("mine")[0]["stopped"]
    live.end(one)
    live.stop()
    assert "stopped" not in latest.LATEST.of("mine")[0], "what has ended was not stopped"


@pytest.mark.parametrize("sent", [None, "text", {"workflow": "text"}, {"workflow": [1]}, {"workflow": {"id": {}}}, {"workflow": {"id": 7}}])
def test_whatever_a_script_sends_in_place_of_a_workflow_ends_no_run(sent: Any, nodes: Callable[[str], Any], server: Server) -> None:
    item = (0, "prompt", {}, {"extra_pnginfo": sent}, [], {})
    server.prompt_queue = SimpleNamespace(get_current_queue_volatile=lambda: ([item], []))  # type: ignore[attr-defined]
    nodes("live").LivePanel(nodes("page").Page("7"), RUN).show(report(nodes), 0)
    assert [message["workflow"] for message in server.sent] == [None]


class Frames:
    """A decoder of four grey frames per latent frame, as bright as it; `done` as in `Pieces`."""

    done = 0

    def next(self, latents: torch.Tensor, ready: int) -> torch.Tensor | None:
        if self.done >= ready:
            return None
        self.done += 1
        return latents[0, 0, self.done - 1, 0, 0].expand(4, 40, 64, 3)


@pytest.fixture
def projecting(nodes: Callable[[str], Any], server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A film of six latent frames, of which two are finished, before a page that can show it."""
    module = nodes("partial_film")
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    server.sockets, server.sockets_metadata = {"page": None}, {"page": {"feature_flags": {"supports_preview_metadata": True}}}  # type: ignore[attr-defined]

    def make(hindrance: Callable[[], str] = lambda: "", pieces: Any = None, go_on: Callable[[], None] = lambda: None) -> Any:
        partial = module.PartialFilm(pieces or Frames(), nodes("page").Page("7"), "run", 24, hindrance, go_on)
        partial.ready = 2
        return partial

    return make


FILM = torch.linspace(0, 1, 6).view(1, 1, 6, 1, 1)


def test_finished_frames_are_sent_piece_by_piece_and_counted(projecting: Callable[..., Any], nodes: Callable[[str], Any], server: Server) -> None:
    partial, one = projecting(), report(nodes)
    for _ in range(4):
        partial.advance(FILM, one)
    assert [(sent["first"], sent["frames"], sent["fps"], sent["run"]) for sent in server.sent] == [(0, 4, 24, "run"), (4, 4, 24, "run")]
    picture = np.asarray(Image.open(BytesIO(b64decode(server.sent[1]["picture"]))))
    assert picture.shape == (40, 4 * 64, 3)
    assert abs(int(picture.mean()) - round(0.2 * 255)) <= 1
    partial.ready = 6
    partial.finish(FILM, one)
    assert [sent["first"] for sent in server.sent] == [0, 4, 8, 12, 16, 20]
    assert (one.shown.frames, one.host_syncs) == (24, 6)
    assert one.shown.seconds > 0


def test_a_film_whose_chunks_end_together_is_not_decoded_twice(projecting: Callable[..., Any], nodes: Callable[[str], Any], server: Server) -> None:
    partial = projecting()
    partial.finish(FILM, report(nodes))
    assert not server.sent


def test_no_more_than_ten_messages_a_second(
    projecting: Callable[..., Any], nodes: Callable[[str], Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, slept = [100.0], []
    monkeypatch.setattr(nodes("partial_film"), "PAUSE_S", 0.1)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: (slept.append(seconds), now.__setitem__(0, now[0] + seconds)))
    partial, one = projecting(), report(nodes)
    for _ in range(30):
        now[0] += 0.02
        partial.advance(FILM, one)
    assert len(server.sent) == 2
    partial.ready = 6
    partial.finish(FILM, one)
    assert len(server.sent) == 6
    assert sum(slept) >= 0.3


@pytest.mark.parametrize("who", ["nobody", "a script", "a page that was closed"])
def test_nothing_is_decoded_where_nobody_looks(who: str, projecting: Callable[..., Any], nodes: Callable[[str], Any], server: Server) -> None:
    match who:
        case "nobody":
            server.client_id = None  # type: ignore[assignment]
        case "a script":
            server.sockets_metadata = {"page": {"feature_flags": {}}}  # type: ignore[attr-defined]
        case _:
            server.sockets = {}  # type: ignore[attr-defined]
    pieces = Frames()
    partial, one = projecting(pieces=pieces), report(nodes)
    partial.advance(FILM, one)
    partial.finish(FILM, one)
    assert (pieces.done, one.shown.as_dict(), server.sent) == (0, {}, [])


def test_what_hinders_is_shown_once_and_the_film_comes_later(projecting: Callable[..., Any], nodes: Callable[[str], Any], server: Server) -> None:
    hindrances = iter(["that needs 2 GiB of free memory, and 1 GiB are free"] * 3 + [""] * 9)
    partial, one = projecting(lambda: next(hindrances)), report(nodes)
    for _ in range(5):
        partial.advance(FILM, one)
    note, *frames = server.sent
    assert note["note"] == "The film is not shown while it grows: that needs 2 GiB of free memory, and 1 GiB are free"
    assert [sent["first"] for sent in frames] == [0, 4]


def test_a_decoder_that_fails_ends_no_run_but_an_interrupt_does(projecting: Callable[..., Any], nodes: Callable[[str], Any], server: Server) -> None:
    class Failing(Frames):
        def next(self, latents: torch.Tensor, ready: int) -> torch.Tensor | None:
            raise RuntimeError("16 channels were expected")

    class Interrupted(Exception):
        """As older hosts have it."""

    def interrupt() -> None:
        raise Interrupted

    partial = projecting(pieces=Failing())
    for _ in range(3):
        partial.advance(FILM, report(nodes))
    assert [sent["note"] for sent in server.sent] == ["The film cannot be shown while it grows: 16 channels were expected"]
    with pytest.raises(Interrupted):
        projecting(go_on=interrupt).advance(FILM, report(nodes))


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept_of_a_film_when_its_run_is_over(fails: bool, projecting: Callable[..., Any], nodes: Callable[[str], Any]) -> None:
    pieces = Frames()
    partial, alive = projecting(pieces=pieces), weakref.ref(pieces)
    preview = SimpleNamespace(start=lambda page, run, shape: partial)
    progress = nodes("progress").Progress(FILM.clone(), RUN, "7", None, True, preview)
    del pieces
    with suppress(KeyboardInterrupt), progress:
        progress.step(report(nodes), SimpleNamespace(index=0, step=0, steps=4, start=0, frames=3), FILM[:, :, :3], FILM)
        if fails:
            raise KeyboardInterrupt
    assert alive() is None
    assert progress.live.name in {message["run"] for message in nodes("latest_runs").LATEST.of(None)}
    assert [message.get("stopped", False) for message in nodes("latest_runs").LATEST.of(None)] == [fails]


def test_a_picture_has_its_most_bytes(nodes: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    film = core("show.film")
    noise, most = np.random.default_rng(0).integers(0, 256, (32, 192, 320, 3), np.uint8), nodes("partial_film").AT_MOST
    assert 0 < len(film.strip_of(noise[:12], most)) <= most
    assert len(film.strip_of(noise[:12], 10 * most)) > most, "the first try is of better quality"
    assert film.strip_of(noise, 1000) is None
    assert film.shrunk(torch.zeros(2, 480, 832, 3), 320).shape == (2, 3, 185, 320)
    assert film.shrunk(torch.zeros(2, 48, 32, 3), 320).shape == (2, 3, 48, 32)


def test_of_few_runs_the_latest_is_kept(nodes: Callable[[str], Any], server: Server) -> None:
    latest = nodes("latest_runs")
    runs = latest.LatestRuns()
    for n in range(2 * latest.KEPT):
        runs.put({"workflow": "w", "node": str(n), "run": "r", "map": {}, "plan": None})
    assert [message["node"] for message in runs.of("w")] == [str(n) for n in range(latest.KEPT, 2 * latest.KEPT)]


def test_a_partial_film_is_kept_for_a_page_that_is_loaded_later(projecting: Callable[..., Any], nodes: Callable[[str], Any], server: Server) -> None:
    films = nodes("latest_films").FILMS
    partial = projecting()
    for _ in range(2):
        partial.advance(FILM, report(nodes))
    assert films.of("run") == server.sent
    assert not films.of("another")


def test_of_many_films_the_latest_pictures_are_kept(nodes: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = nodes("latest_films")
    monkeypatch.setattr(module, "MOST", 4 * (100 + module.BESIDE))
    films = module.LatestFilms()
    for n in range(8):
        films.put({"run": "ab"[n // 5], "first": n, "picture": "x" * 100})
    assert [message["first"] for message in films.of("a")] == [4]
    assert [message["first"] for message in films.of("b")] == [5, 6, 7]


class Closed:
    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise ValueError("I/O operation on closed file.")

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_console_that_is_closed_ends_no_run(nodes: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    progress = nodes("progress")
    monkeypatch.setattr(sys, "stderr", Closed())
    progress.say(["computed 4 of 4 chunk-steps"])


def test_what_a_callback_raises_ends_the_run(nodes: Callable[[str], Any]) -> None:
    """The host interrupts by raising there: it must not be swallowed."""

    def callback(*args: Any) -> None:
        raise KeyboardInterrupt

    progress = nodes("progress").Progress(torch.zeros(1, 2, 3, 4, 4), RUN, None, callback, True)
    chunk = SimpleNamespace(index=0, step=0, start=0, frames=3)
    with pytest.raises(KeyboardInterrupt):
        progress.step(report(nodes), chunk, torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 3, 4, 4))

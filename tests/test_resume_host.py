"""A run that is interrupted in a real ComfyUI goes on when it is queued again."""

from __future__ import annotations

import time

import torch

from tests.host import NEEDS_HOST, Graph, Host, put, report_of, said

pytestmark = NEEDS_HOST


def interrupted(host: Host, graph: Graph, seconds: float = 240) -> None:
    """Queues a film and interrupts it as soon as a state of it lies on the disk."""
    queued, end = host.until_saved(graph), time.monotonic() + seconds
    host.ask("/interrupt", {})
    while not (done := host.ask(f"/history/{queued}")) and time.monotonic() < end:
        time.sleep(0.1)
    assert "execution_interrupted" in [kind for kind, _ in done[queued]["status"]["messages"]]


def test_an_interrupted_film_goes_on_when_it_is_queued_again(host: Host, planned: Graph) -> None:
    film = put(put(planned, "FlowCacheLatent", length=57), "RandomNoise", noise_seed=11)
    whole, counts = host.latents(film), report_of(host, film)
    saved = put(film, "FlowCacheSampler", save_every=1)
    interrupted(host, saved)
    again = host.latents(saved)
    assert torch.equal(again, whole)
    assert not (host.base / "output" / "flowcache_states").exists(), "a finished film leaves nothing"
    told = report_of(host, saved)
    (note,) = [note for note in told["notes"] if "goes on from a saved state" in note]
    assert "of 5 chunks were finished" in note
    assert {key for key in counts if counts[key] != told[key]} <= {"wall_s", "seconds", "notes", "saves"}


def test_another_seed_begins_anew_and_says_so(host: Host, planned: Graph) -> None:
    film = put(put(planned, "FlowCacheSampler", save_every=1), "FlowCacheLatent", length=57)
    interrupted(host, put(film, "RandomNoise", noise_seed=12))
    text = said(host, put(film, "RandomNoise", noise_seed=13), "FlowCacheReport")
    assert "was saved of another film, which differs in seed: 12 there, 13 here; noise and given frames: " in text
    assert "This film begins anew" in text
    (left,) = (host.base / "output" / "flowcache_states").iterdir()
    left.unlink()

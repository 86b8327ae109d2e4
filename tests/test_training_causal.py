"""Training of tiny-causal: teacher and student run as sampling runs them, on what sampling meets."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flowcache_core.models.adapter import ModelAdapter
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.causal_wan_family import SELF_FORCING
from flowcache_core.models.family import Bundled, Family
from flowcache_core.models.skyreels import SkyReelsConfig, SkyReelsV2
from flowcache_core.models.skyreels_family import SKYREELS
from flowcache_core.run.generate import Job, generate
from flowcache_core.training import causal, dit
from flowcache_core.training.causal import batch_of, drawn, folded, regression, rollout
from flowcache_core.training.evaluate import evaluate
from flowcache_core.training.loop import TrainOptions
from flowcache_core.training.scenes import make_scene
from flowcache_core.training.trajectories import CHUNK, LEVELS, Branch, Piece, Teacher, corrected, own_films, teacher_levels, text_of
from tests.toy_family import no_vae, words

SMALL = SkyReelsConfig(dim=128, ffn_dim=64, layers=2, text_dim=16, fps=True)
CAPTIONS = ("red circle moves left", "blue square stands still")
FRAMES, SIDE = 33, 4


def network(fps: bool, layers: int = SMALL.layers) -> SkyReelsV2:
    torch.manual_seed(3)
    made = SkyReelsV2(replace(SMALL, fps=fps, layers=layers))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.eval().requires_grad_(False)


def bundle_of(family: Family, made: SkyReelsV2) -> Bundle:
    return Bundle(replace(family, bundled=Bundled("tiny", "tiny", no_vae, words)), made, nn.Identity(), replace(family.layout, chunk_frames=CHUNK))


class Recording:
    """An adapter that keeps what went into every evaluation and what came out."""

    def __init__(self, inner: ModelAdapter) -> None:
        self.inner, self.calls = inner, list[tuple[Any, Tensor]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward(self, call: Any, attend: Any) -> tuple[Tensor, Tensor]:
        velocity, residual = self.inner.forward(call, attend)
        self.calls.append((replace(call, x=call.x.clone()), velocity.clone()))
        return velocity, residual


def recorded(family: Family, made: SkyReelsV2, job: Job) -> tuple[list[tuple[Any, Tensor]], Tensor]:
    """All calls of a film, and the film."""
    kept: list[Recording] = []

    def recording(adapter: ModelAdapter, sigmas: Any) -> Any:
        kept.append(Recording(adapter))
        return kept[0]

    film, _ = generate(bundle_of(family, made), job, adapter=recording)
    return kept[0].calls, film


JOBS = {
    "student": (SELF_FORCING, Job.usual(SELF_FORCING, "a toy", frames=FRAMES, size=8 * SIDE)),
    "teacher": (SKYREELS, Job("a toy", FRAMES, steps=4, size=8 * SIDE, ar_step=4)),
}


@pytest.mark.parametrize("name", JOBS)
def test_chunks_beside_clean_ones_are_what_sampling_computes_with_its_kv_cache(name: str) -> None:
    """Both one after the other and all at once, beside the finished film."""
    family, job = JOBS[name]
    made = network(family is SKYREELS)
    calls, film = recorded(family, made, job)
    text = torch.cat([words(prompt, SMALL.text_dim) for prompt in ("a toy", "")[: calls[0][0].x.shape[0]]])
    step, whole, after = 2, Branch(made, made.text_kv(text), 5), Branch(made, made.text_kv(text), 5)
    film = film.expand(len(text), -1, -1, -1, -1)
    whole.commit_film(film)
    mine = [(call, velocity) for call, velocity in calls if call.chunk.step == step]
    assert len(mine) == 3
    sigma = mine[0][0].sigma if name == "student" else int(1000 * mine[0][0].sigma) / 1000
    together = whole.velocity(torch.cat([call.x for call, _ in mine], 2), torch.full((len(text), 9), sigma), 0)
    torch.testing.assert_close(together, torch.cat([velocity for _, velocity in mine], 2), rtol=1e-4, atol=1e-4)
    for first, (call, velocity) in enumerate(mine):
        torch.testing.assert_close(after.velocity(call.x, sigma, first), velocity, rtol=1e-4, atol=1e-4)
        after.commit(film[:, :, first * CHUNK : (first + 1) * CHUNK], first)


def test_a_window_ends_what_a_chunk_sees() -> None:
    """In a network of one layer: with more, the keys of a chunk have seen what lies before its window."""
    made = network(True, 1)
    film, x = torch.randn(1, 16, 9, SIDE, SIDE), torch.randn(1, 16, 3, SIDE, SIDE)
    other = torch.cat([torch.randn(1, 16, 3, SIDE, SIDE), film[:, :, 3:]], 2)
    seen = []
    for clean in (film, other):
        branch = Branch(made, made.text_kv(text_of(CAPTIONS[:1], SMALL.text_dim)), 2)
        branch.commit_film(clean)
        seen.append((branch.velocity(x, 0.5, 1), branch.velocity(x, 0.5, 2)))
    assert not torch.allclose(seen[0][0], seen[1][0])
    torch.testing.assert_close(seen[0][1], seen[1][1])


def test_the_student_begins_as_the_teacher_at_its_frame_rate() -> None:
    teacher, student = network(True), SkyReelsV2(replace(SMALL, fps=False))
    student.load_state_dict(folded(teacher))
    x, t, text = torch.randn(1, 16, 3, SIDE, SIDE), torch.tensor([[937.5]]), text_of(CAPTIONS[:1], SMALL.text_dim)

    def seen(layer: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return v

    with torch.no_grad():
        mine, its, slow = (net(x, t, net.text_kv(text), seen, 0, fps) for net, fps in ((student, 16), (teacher, 24), (teacher, 16)))
    torch.testing.assert_close(mine, its)
    assert not torch.allclose(its, slow)


@pytest.mark.parametrize("first", range(len(LEVELS)))
def test_the_teacher_passes_through_the_levels_of_the_student(first: int) -> None:
    levels = teacher_levels(first)
    assert all(now > to for now, to in pairwise(levels))
    assert levels[-1] == 0
    assert set(LEVELS[max(first, 1) :]) <= set(levels)
    assert levels[0] == pytest.approx(LEVELS[first], abs=2e-4)


def test_the_teacher_goes_on_from_a_state_to_where_its_own_film_ended() -> None:
    """From noise, with the same chunks before it; from later states its multistep solver begins anew."""
    made = network(True)
    piece = own_films(made, CAPTIONS, torch.randn(2, 16, 6, SIDE, SIDE))
    again = corrected(made, CAPTIONS, piece.states[:, 0].float(), piece.history.float(), 0)
    assert (piece.first, again.first, corrected(made, CAPTIONS, piece.states[:, 3].float(), piece.history.float(), 3).first) == (0, 0, 3)
    torch.testing.assert_close(again.clean, piece.clean, rtol=0.05, atol=0.05)
    torch.testing.assert_close(again.states, piece.states, rtol=0.05, atol=0.05)


def test_the_teacher_is_guided() -> None:
    made, x = network(True), torch.randn(1, 16, 3, SIDE, SIDE)
    cond, uncond = (Branch(made, made.text_kv(text_of([prompt], SMALL.text_dim)), 5).velocity(x, 0.5, 0) for prompt in (CAPTIONS[0], ""))
    torch.testing.assert_close(Teacher(made, CAPTIONS[:1]).velocity(x, 0.5, 0), uncond + 3.0 * (cond - uncond), rtol=1e-4, atol=1e-4)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"CONFIG": replace(SMALL, fps=False), "CHUNKS": 2, "SIDE": SIDE, "FILMS": 2, "PIECES": 2, "ROUND": 2, "STARTS": (3, 1), "ROLLED": (0, 2)}
    for name, value in sizes.items():
        monkeypatch.setattr(causal, name, value)
    monkeypatch.setattr(causal, "load_bundle", lambda dtype: SimpleNamespace(network=network(True).to(dtype)))


def test_states_of_a_rollout_are_its_films_with_noise_on_them(small: None) -> None:
    noise = causal.noise_of(1, 0, len(LEVELS))
    states, films = rollout(network(False), CAPTIONS, noise)
    assert (states.shape, films.shape) == (noise.shape, noise.shape[1:])
    assert torch.equal(states[0], noise[0])
    branch = Branch(made := network(False), made.text_kv(text_of(CAPTIONS, SMALL.text_dim)), 2)
    branch.commit_film(films)
    for level, (now, to) in enumerate(pairwise((*LEVELS, 0.0))):
        clean = states[level] - now * branch.velocity(states[level], now, 0)
        wanted = states[level + 1] if to else films
        torch.testing.assert_close((1 - to) * clean + to * noise[min(level + 1, 3)], wanted, rtol=1e-4, atol=1e-4)


def test_a_film_that_has_rolled_on_is_corrected_as_a_film_of_its_own(small: None) -> None:
    teacher, student = network(True), network(False)
    place = next(number for number, before in enumerate(causal.ROLLED) if before)
    noise = causal.noise_of(1, place, len(LEVELS), causal.CHUNKS + causal.ROLLED[place])
    states, films = rollout(student, CAPTIONS, noise)
    found = causal.student_piece(teacher, student, 1, place, CAPTIONS)
    first, frames = causal.STARTS[place], causal.CHUNKS * CHUNK
    assert found.history.shape[2] == frames
    torch.testing.assert_close(found.history, films[:, :, -frames:].half())
    torch.testing.assert_close(found.states[:, 0], states[first][:, :, -frames:].half())
    seen = rollout(student, CAPTIONS, noise[:, :, :, -frames - (causal.CHUNKS - 1) * CHUNK :])[1]
    assert not torch.allclose(seen[:, :, -CHUNK:], films[:, :, -CHUNK:], atol=1e-3), (
        "what the window no longer holds has left its mark in what it holds"
    )


def test_examples_lead_to_their_targets_from_the_levels_that_they_have() -> None:
    rng, clean = random.Random(0), torch.randn(2, 16, 6, SIDE, SIDE)
    levels = torch.tensor(LEVELS[1:]).view(1, 3, 1, 1, 1, 1)
    noise = torch.randn(2, 1, 16, 6, SIDE, SIDE)
    piece = Piece(CAPTIONS, (1 - levels) * clean[:, None] + levels * noise, clean, clean + 1)
    met = set()
    for _ in range(40):
        one = drawn(piece, rng)
        film = CAPTIONS.index(one.caption)
        assert torch.equal(one.history, clean[film] + 1)
        sigma = one.sigma[None, :, None, None]
        torch.testing.assert_close(one.state, (1 - sigma) * one.clean + sigma * noise[film, 0])
        met.add(tuple(one.sigma[::3].tolist()))
    assert sorted({sigma for pair in met for sigma in pair}, reverse=True) == pytest.approx(LEVELS[1:])
    assert len(met) > 4


def test_a_batch_has_the_newest_round_and_those_before_it() -> None:
    asked: list[int] = []

    def piece(number: int, place: int) -> Piece:
        asked.append(number)
        clean = torch.zeros(1, 16, 15, SIDE, SIDE)
        return Piece(CAPTIONS[:1], torch.zeros(1, 4, *clean.shape[1:]), clean, clean)

    for step in range(2 * causal.ROUND, 2 * causal.ROUND + 20):
        assert len(batch_of(piece, step, 8)) == 8
    assert set(asked) == {0, 1, 2}
    assert asked.count(2) > len(asked) / 2


def test_training_goes_on_where_it_stopped(tmp_path: Path, small: None) -> None:
    with torch.enable_grad():
        causal.train(tmp_path / "whole", 3, batch=2)
        for until in (0, 1, 2, None):
            causal.train(tmp_path / "parts", 3, batch=2, options=TrainOptions(until))
    whole, parts = (load_file(tmp_path / name / "dit.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())
    begun = folded(network(True))
    assert any(not torch.equal(weight, begun[name].bfloat16()) for name, weight in whole.items())
    assert {path.parent.name for path in (tmp_path / "whole").rglob("round-*/*")} == {"round-0", "round-1"}


def test_every_parameter_learns(small: None) -> None:
    student = network(False).requires_grad_(True)
    clean = torch.randn(2, 16, 6, SIDE, SIDE)
    examples = [drawn(Piece(CAPTIONS, torch.randn(2, 4, *clean.shape[1:]), clean, clean), random.Random(k)) for k in range(2)]
    with torch.enable_grad():
        regression(student, examples, 1.0).backward()
    without = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert not without


def test_a_student_is_held_against_the_films_of_its_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [torch.full((FRAMES, 3, 32, 32), value) for value in (0.5, 0.5, 0.2, 0.3)]
    monkeypatch.setattr("flowcache_core.training.evaluate.generate", lambda *args: (None, None))
    monkeypatch.setattr("flowcache_core.training.evaluate.decode", lambda *args: shown.pop(0))
    monkeypatch.setattr("flowcache_core.training.evaluate.vae_of", lambda family: None)
    monkeypatch.setattr("flowcache_core.training.evaluate.reconstruction", lambda *args, **kw: 30.0)
    student, teacher = (bundle_of(*pair) for pair in ((SELF_FORCING, network(False)), (SKYREELS, network(True))))
    figures = evaluate(student, JOBS["student"][1], lambda index: make_scene(index, FRAMES, 32), 2, (teacher, JOBS["teacher"][1]))
    assert figures["teacher"]["psnr_db"] == (60.0, 40.0), "100 dB of equal films, 20 dB of a tenth of all grey levels"
    assert figures["teacher"]["psnr_of_other_prompts_db"][0] == pytest.approx(10.46, abs=0.01)
    assert figures["teacher"]["films"]["sprites"] == figures["films"]["sprites"]


def test_the_student_has_the_sizes_of_the_teacher() -> None:
    assert replace(causal.CONFIG, fps=True) == dit.CONFIG

"""Training of tiny-magi: it runs the network as sampling does, on what sampling meets."""

from __future__ import annotations

import random
from collections.abc import Hashable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flowcache_core.kernels.attention import attention
from flowcache_core.models.bundle import Bundle
from flowcache_core.models.family import Bundled
from flowcache_core.models.magi import Magi
from flowcache_core.models.magi_adapter import ALONE, NULL, RANGES, TEXT, MagiAdapter
from flowcache_core.models.magi_family import CHUNK_FRAMES, COMMIT, MAGI
from flowcache_core.run.generate import Given, Job, generate
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.training import magi, magi_vae
from flowcache_core.training.basis import Basis, fit
from flowcache_core.training.clips import Clips
from flowcache_core.training.loop import TrainOptions
from flowcache_core.training.magi import Part, RangedAttention, draw_batch, draw_row, halves, initialise, run, scene, without_padding
from flowcache_core.training.recipes import RECIPES
from flowcache_core.training.scenes import HELD_OUT, SHAPES, Scene, _reached, make_scene, outline, render
from flowcache_core.training.vae import reconstruction
from tests.tiny_magi import PLAIN, tiny_magi
from tests.toy_family import no_vae, words

JOB = Job("a toy", frames=144, steps=8, seed=5, size=64, cfg=3.0, ar_step=2, shift=3.0, solver="euler", addnoise=0)


class Recording(MagiAdapter):
    """Keeps what went into every evaluation and what came out."""

    def __init__(self, network: Magi) -> None:
        super().__init__(network)
        self.calls: list[tuple[Chunk, tuple[Hashable, ...], Tensor, Tensor]] = []

    def forward(self, call: Any, attend: Any) -> tuple[Tensor, Tensor]:
        velocity, residual = super().forward(call, attend)
        self.calls.append((call.chunk, call.branches, call.x.clone(), velocity))
        return velocity, residual

    def of(self, branch: str, chunk: int, step: int) -> tuple[Tensor, Tensor]:
        """Latents that a chunk had at a step, and the velocity that the branch gave them."""
        ((_, branches, x, velocity),) = [call for call in self.calls if call[0].index == chunk and call[0].step == step]
        at = branches.index(branch)
        return x[at : at + 1], velocity[at : at + 1]


@pytest.fixture(scope="module")
def recorded() -> tuple[Recording, Tensor]:
    """The calls of a film, and the text of its prompt."""
    network = tiny_magi(PLAIN)
    bundle = Bundle(replace(MAGI, bundled=Bundled("tiny", "tiny", no_vae, words)), network, nn.Identity(), MAGI.layout)
    adapter = Recording(network)
    given = Given(start=torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(1)))
    generate(bundle, JOB, given=given, adapter=lambda _, sigmas: adapter)
    return adapter, bundle.text(JOB.prompt)


@pytest.mark.parametrize("lead", [(0, 0), (0, 5), (1, 6), (2, 7), (4, 7)], ids=lambda lead: f"chunk {lead[0]} at step {lead[1]}")
@pytest.mark.parametrize("branch", [TEXT, NULL])
def test_a_row_in_training_is_what_sampling_computes_for_it(recorded: tuple[Recording, Tensor], lead: tuple[int, int], branch: str) -> None:
    """With its KV cache, chunk after chunk; `lead`: the oldest chunk in flight, and its step."""
    adapter, text = recorded
    oldest, step = lead
    active = [(k, step - 2 * (k - oldest)) for k in range(oldest, 6) if step >= 2 * (k - oldest)]
    levels, before = MAGI.noise.levels(8, 3.0), min(oldest, 4)
    parts = [Part(oldest - before + k, COMMIT, 1, None, True) for k in range(before)]
    clean = [adapter.of(TEXT, part.chunk, 8)[0] for part in parts]
    active_calls = [adapter.of(branch, k, at) for k, at in active]
    for k, at in active:
        seen = min(RANGES[at // 2], before + k - oldest + 1)
        parts.append(Part(k, levels[at], seen, JOB.prompt if branch == TEXT else None, branch == NULL))
    with torch.no_grad():
        found = run(adapter.network, torch.cat([*clean, *(x for x, _ in active_calls)]), parts, {JOB.prompt: text})
    torch.testing.assert_close(found[before:], torch.cat([velocity for _, velocity in active_calls]), rtol=1e-4, atol=1e-4)


def test_a_chunk_alone_is_what_sampling_computes_for_it(recorded: tuple[Recording, Tensor]) -> None:
    adapter, _ = recorded
    levels = MAGI.noise.levels(8, 3.0)
    x, velocity = adapter.of(ALONE, 2, 3)
    with torch.no_grad():
        found = run(adapter.network, x, [Part(2, levels[3], 1, None, True)], {})
    torch.testing.assert_close(found, velocity, rtol=1e-4, atol=1e-4)


def test_attention_over_ranges_is_attention_over_their_keys_with_its_gradients() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, heads, 6, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    seen, weight = (1, 2, 1, 2, 3), torch.randn(5, 4, 6, 8, dtype=torch.float64)

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ranges = [slice(i - count + 1, i + 1) for i, count in enumerate(seen)]
        return torch.cat([attention(q[i : i + 1], *(torch.cat([*x[of]], 1)[None] for x in (k, v))) for i, of in enumerate(ranges)])

    with torch.enable_grad():
        both = RangedAttention.apply(q, k, v, seen), written_out(q, k, v)
        pairs = [(made, torch.autograd.grad((made * weight).sum(), (q, k, v))) for made in both]
    torch.testing.assert_close(pairs[0], pairs[1])


def test_drawn_rows_are_those_that_sampling_meets() -> None:
    rng, kinds = random.Random(0), set()
    for _ in range(3000):
        row = draw_row(rng, "red circle")
        active = [part for part in row if part.active]
        finished = row[: len(row) - len(active)]
        assert active
        assert all(not part.active for part in finished)
        assert [part.chunk for part in row] == [*range(row[0].chunk, row[0].chunk + len(row))]
        assert row[-1].chunk < magi.CHUNKS
        assert all(part == Part(part.chunk, COMMIT, 1, None, True, active=False) for part in finished)
        assert all(older.level < younger.level for older, younger in pairwise(active))
        assert len({(part.text, part.dropped) for part in active}) == 1
        assert active[0].dropped == (active[0].text is None)
        assert all(1 <= part.seen <= min(place + 1, 5) for place, part in enumerate(row))
        assert all(part.given == 0 for part in active[1:])
        kinds.add((active[0].text, len(active), len(finished), max(part.seen for part in row)))
    assert {text for text, *_ in kinds} == {None, "", "red circle"}
    assert {seen for *_, seen in kinds} == {1, 2, 3, 4, 5}
    assert {(len_active, finished) for _, len_active, finished, _ in kinds} >= {(1, 0), (4, 0), (4, 1), (1, 4)}


def test_a_batch_has_as_many_chunks_as_asked_for_in_two_even_shares() -> None:
    rows = draw_batch(random.Random(1), iter([(k, "red circle") for k in range(100)]), 12)
    shares = halves(rows)
    first, second = (sum(len(parts) for _, parts in share) for share in shares)
    assert 12 <= first + second <= 16
    assert abs(first - second) <= 5
    assert sorted(index for share in shares for index, _ in share) == [index for index, _ in rows]


def test_padding_is_cut_off_but_one_row() -> None:
    text = torch.randn(1, 6, 4)
    text[:, 4:] = 0
    assert torch.equal(without_padding(text), text[:, :4])
    assert without_padding(torch.zeros(1, 6, 4)).shape == (1, 1, 4)


@pytest.fixture(scope="module")
def basis() -> Basis:
    return fit(3, lambda seed: make_scene(seed, 24, 64))


def small_scene(index: int, size: int = 32) -> Scene:
    return make_scene(index, magi.FRAMES, size, magi.PACE)


def test_a_few_steps_of_training_go_on_where_they_stopped(tmp_path: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magi, "CONFIG", replace(PLAIN, text_dim=16))
    monkeypatch.setattr(magi, "scene", small_scene)
    monkeypatch.setattr(magi, "load_or_fit", lambda *args: basis)
    monkeypatch.setattr(magi, "SIZE", 64)
    monkeypatch.setattr(magi, "SMALL", 32)
    magi.words_of.cache_clear()
    with torch.enable_grad():
        magi.train(tmp_path / "whole", 3, batch=5)
        magi.train(tmp_path / "pieces", 3, batch=5, options=TrainOptions(2))
        magi.train(tmp_path / "pieces", 3, batch=5)
        magi.train(tmp_path / "on", 1, batch=5, options=TrainOptions(start=tmp_path / "whole" / "dit.safetensors"))
    magi.words_of.cache_clear()
    whole, pieces, on = (load_file(tmp_path / name / "dit.safetensors") for name in ("whole", "pieces", "on"))
    assert all(torch.equal(weight, pieces[name]) for name, weight in whole.items())
    assert all(torch.allclose(weight, on[name], atol=0.05) for name, weight in whole.items()), "a step goes on from the weights to start with"
    assert any(not torch.equal(weight, on[name]) for name, weight in whole.items())
    assert {name for name, weight in whole.items() if weight.dtype != torch.bfloat16} == {"rope.bands"}
    assert torch.equal(whole["rope.bands"], magi.SLOWEST ** (torch.arange(len(whole["rope.bands"])) / (len(whole["rope.bands"]) - 1))), "as set"


def test_fresh_weights_say_nothing_and_every_parameter_learns(basis: Basis) -> None:
    network = Magi(replace(PLAIN, text_dim=256))
    initialise(network)
    clips = Clips(basis, small_scene, magi.CHUNKS * CHUNK_FRAMES)
    with torch.enable_grad():
        network.final_linear.linear.weight.data.normal_(std=0.1)
        magi.loss_of(network, clips, magi.batch_of(clips, 0, 12), 0, 1.0).backward()
    without = {name for name, p in network.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not without
    assert not network.rope.bands.requires_grad


def test_first_frames_alone_are_learnt(basis: Basis) -> None:
    """Steps down the gradient of a batch lower its loss."""
    torch.manual_seed(0)
    network = Magi(replace(PLAIN, text_dim=256))
    initialise(network)
    clips, kind = Clips(basis, magi.beginning, 1), magi.FIRST_FRAMES
    rows = magi.batch_of(clips, 0, kind.times, magi.draw_beginning)
    assert len(rows) == kind.times
    assert all(part.chunk == 0 and part.seen == 1 and part.active for _, row in rows for part in row)
    optimiser, losses = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 1e-2), list[float]()
    with torch.enable_grad():
        for _ in range(8):
            optimiser.zero_grad()
            loss = magi.loss_of(network, clips, rows, 0, 2.0, begun=True)
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_beginning_is_what_a_clip_begins_with(basis: Basis) -> None:
    whole, first = Clips(basis, magi.scene, magi.CHUNKS * CHUNK_FRAMES), Clips(basis, magi.beginning, 1)
    (clip, caption), (begun, same) = whole[5], first[5]
    assert caption == same
    assert torch.equal(begun, clip[:, :1])


def test_the_vae_starts_at_the_principal_components(basis: Basis) -> None:
    vae = magi_vae.solution(basis)
    film = render(make_scene(7, 24, 64)).transpose(0, 1) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(film[None])[0]
        torch.testing.assert_close(latents, basis.encode(film), rtol=0.01, atol=0.01)
        linear = basis.decode(latents, first=4)
        assert (vae.decode(latents[None])[0] - linear).square().mean() < 0.1 * (linear - film).square().mean() + 1e-3


def test_the_decoder_learns_and_goes_on(tmp_path: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magi_vae, "load_or_fit", lambda *args: basis)
    monkeypatch.setattr(magi_vae, "scene", lambda seed: make_scene(seed, 16, 32))
    with torch.enable_grad():
        magi_vae.train(tmp_path, 1)
        magi_vae.train(tmp_path, 2)
    assert (tmp_path / "vae.safetensors").exists()
    assert reconstruction(magi_vae.solution(basis), 1, lambda seed: scene(seed, 32)) > 15


def test_the_decoder_begins_with_the_weights_that_it_is_given(tmp_path: Path, basis: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(magi_vae, "load_or_fit", lambda *args: basis)
    given = {k: v + 0.5 for k, v in magi_vae.solution(basis).state_dict().items()}
    magi_vae.train(tmp_path, 0, start=given)
    made = load_file(tmp_path / "vae.safetensors")
    assert made.keys() == given.keys()
    assert all(torch.equal(made[k], v.half()) for k, v in given.items())


@pytest.mark.parametrize("name", RECIPES)
def test_films_that_a_model_is_judged_by_are_as_long_as_its_clips_at_most_and_in_whole_chunks(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.family.bundled is not None
    assert recipe.family.bundled.name == name
    bundle = Bundle(recipe.family, None, None, recipe.family.layout)
    recipe.family.check(recipe.job.schedule(bundle))
    clip = recipe.scene(HELD_OUT)
    assert recipe.job.frames <= clip.frames
    assert recipe.job.size == clip.size


def test_a_clip_is_drawn_once_and_the_pool_grows(basis: Basis, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = Clips(basis, small_scene, magi.CHUNKS * CHUNK_FRAMES, every=2)
    latents, caption = clips[3]
    assert latents.shape == (16, 30, 4, 4)
    assert caption == small_scene(3).caption
    monkeypatch.setattr("flowcache_core.training.clips.render", lambda *args: pytest.fail("it was drawn again"))
    assert torch.equal(clips[3][0], latents)
    assert (clips.pool(0), clips.pool(9), clips.pool(10**6)) == (256, 260, 4096)


def test_a_single_given_frame_is_a_clip_that_stands_still(basis: Basis) -> None:
    clips = Clips(basis, small_scene, magi.CHUNKS * CHUNK_FRAMES)
    frame = render(small_scene(5), frames=1).transpose(0, 1) * 2 - 1
    torch.testing.assert_close(clips.still(5), basis.encode(frame.expand(-1, 4, -1, -1)))


def test_a_sprite_is_drawn_wherever_it_may_reach() -> None:
    """What `render` leaves out of the picture of a sprite is what its shape does not cover."""
    for shape in SHAPES:
        ys, xs = torch.meshgrid(torch.arange(128) + 0.5, torch.arange(128) + 0.5, indexing="ij")
        for radius in (5.0, 17.9):
            rows, columns = _reached(torch.tensor([40.0, 50.0]), radius, 128), _reached(torch.tensor([-4.0, 20.0]), radius, 128)
            for y, x in ((40.0, -4.0), (50.0, 20.0)):
                cover = 0.5 - outline(shape, xs - x, ys - y, radius) > 0
                outside = torch.ones(128, 128, dtype=torch.bool)
                outside[rows, columns] = False
                assert not (cover & outside).any()

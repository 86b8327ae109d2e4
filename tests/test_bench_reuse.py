"""`bench reuse`: the published increment, equal shares, and what every rule of the sweep is."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from itertools import pairwise

import pytest
from torch import Tensor

from flowcache_core.bench import reuse, sweep
from flowcache_core.bench.increment import incremental
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.policies import Chunkwise
from flowcache_core.policies.target import Target
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.loop import sample_chunks
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule
from flowcache_core.sampling.solvers import Euler
from tests.driven import Driven


def test_a_reused_step_repeats_the_increment_of_the_last_computed_one(net: SkyReelsV2, texts: Tensor, noise_of: Callable[..., Tensor]) -> None:
    schedule, sigmas, path = ChunkSchedule(3, 3, 12), flow_sigmas(12), []

    def predict(x: Tensor, chunk: Chunk) -> Tensor:
        path.append(x)
        return session.denoise(x, chunk, texts[:1], ("cond",))

    policy = Chunkwise(threshold=10, warmup_steps=2, max_reuse=4, replay="residual", order=0)
    with Session(incremental(SkyReelsAdapter(net), sigmas), schedule, sigmas, (4, 4), policy=policy) as session:
        film = sample_chunks(Driven(predict, session), noise_of(3), schedule, sigmas, Euler())
    moves = [after - before for before, after in pairwise([*path, film])]
    made = session.report.as_dict()["map"][0]
    assert made == "221111211112"
    for step, digit in enumerate(made):
        if digit == "1":
            held = moves[max(made.rfind("2", 0, step), 0)]
            assert (moves[step] - held).abs().max() <= 1e-5 * held.abs().max()
    assert (moves[6] - moves[1]).abs().max() > 0.1 * moves[1].abs().max(), "steps grow, so a computed one moves further"


def test_without_reuse_the_increment_adapter_is_the_plain_one(cached: Callable[..., tuple[Tensor, object]], noise_of: Callable[..., Tensor],
                                                               net: SkyReelsV2, texts: Tensor) -> None:  # fmt: skip
    schedule, sigmas = ChunkSchedule(6, 3, 5, 2), flow_sigmas(5)
    with Session(incremental(SkyReelsAdapter(net), sigmas), schedule, sigmas, (4, 4)) as session:
        film = sample_chunks(Driven(lambda x, c: session.denoise(x, c, texts[:1], ("cond",)), session), noise_of(6), schedule, sigmas, Euler())
    assert (film == cached(noise_of(6), schedule)[0]).all()


@pytest.mark.parametrize(("x", "y"), [(0.2, 10.0), (0.3, 15.0), (0.4, 20.0), (0.55, 35.0), (0.6, 40.0), (0.19, None), (0.61, None)])
def test_equal_shares_lie_on_the_line_between_neighbours(x: float, y: float | None) -> None:
    got = sweep.between([(0.2, 10.0), (0.4, 20.0), (0.6, 40.0)], x)
    assert got == (y if y is None else pytest.approx(y))


def test_the_summary_has_every_rule_at_every_share() -> None:
    rows = [
        {"rule": name, "setting": s, "share": share, "psnr": gain + 50 * share, "ssim": share, "wall_ratio": 1.0}
        for name, gain in (("a", 0.0), ("b", 5.0)) for s, share in enumerate((0.7, 0.3, 0.5))
    ]  # fmt: skip
    said = sweep.summary([*rows, {"rule": "c", "setting": 1, "share": 0.5, "psnr": 1.0, "ssim": 1.0, "wall_ratio": 1.0}], reuse.EQUAL_SHARES)
    assert [(r["rule"], r["share"], r["psnr"]) for r in said] == [
        ("a", 0.55, 27.5), ("b", 0.55, 32.5), ("c", 0.55, None), ("a", 0.4, 20.0), ("b", 0.4, 25.0), ("c", 0.4, None),
    ]  # fmt: skip
    assert json.loads(json.dumps(said)) == said


def test_the_sweep_names_its_rules_and_all_of_them_can_go_to_a_worker() -> None:
    every = reuse.rules()
    assert {r.rule for r in every} == {"default", "order-0", "latent", "published-residual", "published-increment", "euler"}
    assert len({(r.rule, r.setting) for r in every}) == len(every)
    assert pickle.loads(pickle.dumps(every)) == every
    for point in every:
        assert isinstance(point.policy, Target) == (point.rule == "published-residual")
        assert point.increment == (point.rule == "published-increment")
        assert point.solver == ("euler" if point.rule in ("published-increment", "euler") else "unipc")

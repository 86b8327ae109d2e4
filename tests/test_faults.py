"""Whatever a run ends in, at whichever stage: nothing of it stays, and the next run is the one that would have been without it."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flowcache_core.models.bundle import Bundle
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.planned import Planned
from flowcache_core.run.session import Session
from flowcache_core.sampling import loop
from tests.faults import KINDS, MODES, STAGES, Fault, Made, Mode, Stage, at_stage, attempt, calls_of, tiny_bundle
from tests.ledger import Ledger

CASES = [(name, mode) for name, stage in STAGES.items() for mode in stage.modes]


@pytest.fixture(scope="module", autouse=True)
def collected_fast() -> Iterator[None]:
    """What there was before is set aside: otherwise a collection takes longer than a run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return tiny_bundle()


@pytest.fixture(scope="module")
def wanted(bundle: Bundle) -> Callable[[str], Made]:
    """Of a mode, the run that nothing disturbs, made once."""
    made: dict[str, Made] = {}

    def of(name: str) -> Made:
        if name not in made:
            made[name] = MODES[name].make(bundle)
        return made[name]

    return of


@pytest.fixture(scope="module")
def calls(bundle: Bundle) -> dict[str, dict[str, int]]:
    return {how: calls_of(mode, bundle) for how, mode in MODES.items()}


def left_by(call: Callable[[], object], bundle: Bundle) -> int:
    """Bytes of storages that were made in the call and are alive behind it."""
    ledger = Ledger(*bundle.network.parameters(), *bundle.vae.parameters())
    with ledger:
        attempt(call)
    if ledger.held():
        gc.collect()  # a picture of the report lies in a circle of references
    return ledger.held()


@pytest.mark.parametrize(("name", "how"), CASES, ids=lambda text: text.replace(" ", "-"))
def test_a_fault_at_a_stage_leaves_nothing_and_the_next_run_right(
    name: str, how: str, bundle: Bundle, wanted: Callable[[str], Made], calls: dict[str, dict[str, int]]
) -> None:
    """Every kind of fault, at the first call of the stage, the second, the middle one and the last; which kind where, changes from case to case."""
    stage, mode, reference, last = STAGES[name], MODES[how], wanted(how), calls[how][name]
    assert last > 0
    kinds, middle = deque(KINDS), last // 2 + 1
    kinds.rotate(CASES.index((name, how)))
    with at_stage(stage, Fault(middle, KINDS[kinds[0]])):
        assert left_by(lambda: mode.make(bundle), bundle) == 0
    for kind, at in zip(list(kinds)[1:], (last, 1, min(2, last), middle), strict=True):
        with at_stage(stage, Fault(at, KINDS[kind])) as fault:
            assert attempt(lambda: mode.make(bundle)) is type(KINDS[kind]())
        assert fault.calls == at, "nothing goes on behind a fault"
    assert mode.make(bundle).same(reference)


def test_every_stage_is_somebodys() -> None:
    assert {mode for stage in STAGES.values() for mode in stage.modes} == set(MODES)
    assert len(CASES) > 100


@pytest.mark.parametrize("how", MODES)
def test_a_finished_run_leaves_nothing_either(how: str, bundle: Bundle, wanted: Callable[[str], Made]) -> None:
    wanted(how)
    assert left_by(lambda: MODES[how].make(bundle), bundle) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_ended_a_run_is_what_is_raised(kind: str, bundle: Bundle) -> None:
    """Even where completing the report fails after it, as on a device that is out of memory."""
    for how in ("block-causal", "bidirectional"):
        with at_stage(STAGES["report closed"], Fault(1)) as late, at_stage(STAGES["block"], Fault(3, KINDS[kind])):
            assert attempt(lambda how=how: MODES[how].make(bundle)) is type(KINDS[kind]())  # type: ignore[misc]
        assert late.calls == 1


@pytest.mark.parametrize("fails", [STAGES["clock stopped"], Stage(Chunkwise, "findings")], ids=["clock", "last words"])
def test_memory_is_freed_where_the_report_cannot_be_completed(fails: Stage, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Session] = []
    original = Session.__enter__

    def enter(session: Session) -> Session:
        opened.append(session)
        return original(session)

    monkeypatch.setattr(Session, "__enter__", enter)
    with at_stage(fails, Fault(1)):
        assert attempt(lambda: MODES["threshold"].make(bundle)) is RuntimeError
    (session,) = opened
    assert (len(session.state), session._kv.bytes, len(session._text), session.report._parts) == (0, 0, 0, None)


@pytest.mark.parametrize("seconds", [False, True], ids=["share", "seconds"])
def test_a_policy_is_the_same_after_a_fault(seconds: bool, bundle: Bundle) -> None:
    """Settings are frozen: one object serves any number of runs, those that end badly too."""
    policy = Planned(share=0.7, seconds=1e6 * seconds)
    mode = Mode(policy)
    first = mode.make(bundle)
    with at_stage(STAGES["block"], Fault(5)):
        assert attempt(lambda: mode.make(bundle)) is RuntimeError
    assert mode.make(bundle).same(first)
    assert policy == Planned(share=0.7, seconds=1e6 * seconds)


# runs beside each other


@pytest.mark.parametrize("how", ["block-causal", "KV Compressor", "Motion", "bidirectional"])
@pytest.mark.parametrize("fails", [False, True], ids=["", "and-fails"])
def test_a_run_inside_another_changes_neither(how: str, fails: bool, bundle: Bundle, wanted: Callable[[str], Made]) -> None:
    """Two samplers of one model, the second begun while the first is in the middle."""
    reference, begun = wanted(how), list[object]()

    def on_step(chunk: object) -> None:
        if len(begun) == 3:
            begun.append(chunk)
            if not fails:
                assert MODES[how].make(bundle).same(reference)
                return
            with at_stage(STAGES["head"], Fault(4)):
                assert attempt(lambda: MODES[how].make(bundle)) is RuntimeError
        begun.append(chunk)

    assert MODES[how].make(bundle, on_step).same(reference)
    assert len(begun) > 4


def test_two_models_taking_turns_are_two_models(bundle: Bundle) -> None:
    other, mode = tiny_bundle(seed=7), MODES["KV Compressor"]
    first, second = mode.make(bundle), mode.make(other)
    assert not torch.equal(first.latents, second.latents)

    def on_step(chunk: object) -> None:
        if not met:
            met.append(mode.make(other))

    met: list[Made] = []
    assert mode.make(bundle, on_step).same(first)
    assert met[0].same(second)


def test_runs_in_threads_are_those_of_one_thread(bundle: Bundle, wanted: Callable[[str], Made]) -> None:
    modes = ["block-causal", "KV Compressor", "Motion by a plan", "bidirectional"]
    references = [wanted(how) for how in modes]
    with ThreadPoolExecutor(len(modes)) as pool:
        made = list(pool.map(lambda how: MODES[how].make(bundle), modes))
    assert all(one.same(reference) for one, reference in zip(made, references, strict=True))


# a model that the host moves, changes or lets go of


@pytest.mark.parametrize("how", ["block-causal", "KV Compressor", "Motion", "bidirectional"])
def test_a_model_that_was_unloaded_and_loaded_again_makes_the_same_film(how: str) -> None:
    """The host puts other storages under the weights: nothing of a run may hang on the old ones."""
    bundle = tiny_bundle()
    first = MODES[how].make(bundle)
    for weight in bundle.network.parameters():
        kept = weight.data.clone()
        weight.data = torch.empty(0)
        weight.data = kept
    assert MODES[how].make(bundle).same(first)


def test_a_model_whose_weights_change_between_runs_is_another_model(bundle: Bundle) -> None:
    """As a LoRA changes them, and is taken off again."""
    mode, mine = MODES["KV Compressor"], tiny_bundle()
    first = mode.make(mine)
    for weight in mine.network.parameters():
        weight.mul_(1.01)
    changed = mode.make(mine)
    assert not torch.equal(changed.latents, first.latents)
    for weight, original in zip(mine.network.parameters(), bundle.network.parameters(), strict=True):
        weight.copy_(original)
    assert mode.make(mine).same(first)


# clocks


JUMPS: dict[str, Callable[[int], float]] = {
    "stands": lambda call: 100.0,
    "backwards": lambda call: 1e6 - 10.0 * call,
    "leaps": lambda call: 1e9 * call,
    "to and fro": lambda call: (-1.0) ** call * 1e12,
}


@pytest.fixture(params=JUMPS)
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**9))
    monkeypatch.setattr("time.perf_counter", lambda: JUMPS[request.param](next(calls)))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("how", ["block-causal", "Motion", "bidirectional"])
def test_a_clock_that_jumps_changes_no_film_and_no_count(how: str, bundle: Bundle, wanted: Callable[[str], Made]) -> None:
    made = MODES[how].make(bundle)
    assert made.same(wanted(how))
    assert made.report.wall_s > 0
    assert all(seconds >= 0 for seconds in made.report.clock.seconds.values())
    assert 1 / made.report.wall_s < float("inf")


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("mode", [Mode(Planned(seconds=5.0)), Mode(Planned(seconds=5.0), bidirectional=True)], ids=["by chunk", "by row"])
def test_a_budget_in_seconds_under_a_clock_that_jumps_is_some_plan(mode: Mode, bundle: Bundle) -> None:
    made = mode.make(bundle)
    assert torch.isfinite(made.latents).all()
    assert made.report.plans
    assert 0 < made.report.share <= 1
    assert not {"nan", "inf"} & set(made.told.replace(",", " ").split())


def test_an_evaluation_never_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([5.0, 5.0, 7.0, 3.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    chunk = object()
    assert loop.seconds_of(lambda chunk: None, chunk, torch.device("cpu")) == loop.TICK  # type: ignore[arg-type]
    assert loop.seconds_of(lambda chunk: None, chunk, torch.device("cpu")) == loop.TICK  # type: ignore[arg-type]

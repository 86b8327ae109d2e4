"""Who waits for the device, on a device that is pretended: its tensors compute on the processor and count every time that the host
would have stood still. On CUDA, where there is one, PyTorch itself watches."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from flowcache_core.kernels import transfer
from flowcache_core.kernels.transfer import Fetched, Inbox, Mark, Side
from flowcache_core.kv import stored
from flowcache_core.kv.compressor import Compressor
from flowcache_core.kv.policy import KVPolicy
from flowcache_core.kv.scores import KV_POLICIES, RKV, Even, KeyNorm, Salience
from flowcache_core.kv.scores.salience import HeadInfo, SalienceHead
from flowcache_core.models.skyreels import SkyReelsV2
from flowcache_core.models.skyreels_adapter import SkyReelsAdapter
from flowcache_core.policies.chunkwise import Chunkwise
from flowcache_core.policies.motion import PRESETS, Motion
from flowcache_core.policies.multirate import Multirate
from flowcache_core.policies.planned import Planned
from flowcache_core.policies.protocol import CachePolicy
from flowcache_core.policies.target import Target
from flowcache_core.run.report import RunReport
from flowcache_core.run.sections import SectionSession
from flowcache_core.run.session import Session
from flowcache_core.sampling.chunk import Chunk
from flowcache_core.sampling.given import GivenNoise
from flowcache_core.sampling.loop import sample_chunks, sample_sections
from flowcache_core.sampling.noise import flow_sigmas
from flowcache_core.sampling.schedule import ChunkSchedule, Row, sections_of
from flowcache_core.sampling.solvers import UniPC
from tests.driven import Driven, DrivenSections

AWAY = torch.device("meta")
"""The name under which the pretended device goes; nothing else here is on it."""
aten = torch.ops.aten
ASKING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten._unique2.default}
"""Operations whose result, or whose size, the host has to be told."""
SIDE = 8


class Far(Tensor):
    """A tensor of the pretended device."""

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        return Tensor._make_wrapper_subclass(  # type: ignore[no-any-return, attr-defined]
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device=AWAY
        )

    def __init__(self, near: Tensor) -> None:
        self.near = near

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """On the processor; a tensor that comes back as it went in stays itself."""
    far = {id(tensor.near): tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Far)}
    args, kwargs = tree_map(lambda leaf: leaf.near if isinstance(leaf, Far) else leaf, (args, kwargs))
    device = kwargs.get("device")
    stays = bool(far) if device is None else torch.device(device) == AWAY
    out = func(*args, **(kwargs if device is None else {**kwargs, "device": torch.device("cpu")}))
    return tree_map(lambda leaf: far.get(id(leaf), Far(leaf)) if stays and isinstance(leaf, Tensor) else leaf, out) if stays else out


class Watch(TorchDispatchMode):
    """`waits`: for each time that the host had to wait, the operation and the line of ours that asked for it; `rows`: how many there were
    when each row began."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.rows: list[int] = []

    @property
    def per_row(self) -> list[int]:
        return [end - begin for begin, end in pairwise((*self.rows, len(self.waits)))]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        far = [tensor for tensor in tensors if isinstance(tensor, Far)]
        assert all(isinstance(tensor, Far) or tensor.device != AWAY for tensor in tensors), f"made from numbers of the host: {where()}"
        if self._waits(func, args, kwargs, tensors, far):
            self.waits.append(f"{func} in {where()}")
        elif far and func not in (aten.copy_.default, aten._to_copy.default):
            assert all(isinstance(tensor, Far) or tensor.ndim == 0 for tensor in tensors), f"{func} on two devices: {where()}"
        return computed(func, args, kwargs)

    @staticmethod
    def _waits(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], far: list[Far]) -> bool:
        if func in ASKING:
            return bool(far)
        if func is aten._to_copy.default:
            leaves, arrives = bool(far), torch.device(kwargs.get("device") or tensors[0].device) == AWAY
            return leaves != arrives and (leaves or not kwargs.get("non_blocking"))
        if func is aten.copy_.default:
            to, source = args[:2]
            return isinstance(to, Far) != isinstance(source, Far) and not (isinstance(to, Far) and any(args[2:]))
        if func is aten.repeat_interleave.Tensor:
            return bool(far) and kwargs.get("output_size") is None
        return func in (aten.index.Tensor, aten.index_put_.default) and any(one is not None and one.dtype == torch.bool for one in args[1])


def where() -> str:
    mine = [frame for frame in traceback.extract_stack() if "flowcache_core" in frame.filename]
    return " < ".join(f"{frame.filename.rsplit('/', 1)[1]}:{frame.lineno}" for frame in reversed(mine[-3:]))


def sent(network: SkyReelsV2) -> SkyReelsV2:
    """The network, on the pretended device."""
    there = copy.deepcopy(network)
    for module in there.modules():
        for name, weight in module._parameters.items():
            module._parameters[name] = None if weight is None else Far(weight.data)  # type: ignore[assignment]
    return there


@dataclass(frozen=True)
class RowByRow(Driven):
    """Notes where a row begins. `by_row` False: every chunk is decided when its turn comes, as if it were alone in its row."""

    watch: Any = None
    by_row: bool = True

    def begin_row(self, chunks: Sequence[Chunk], film: Tensor) -> None:
        if isinstance(self.watch, Watch):
            self.watch.rows.append(len(self.watch.waits))
        if self.by_row:
            super().begin_row(chunks, film)


def film(network: SkyReelsV2, texts: Tensor, policy: CachePolicy | None = None, kv: KVPolicy | None = None, given: int = 0, frames: int = 9,
         steps: int = 8, window: int | None = 3, around: Callable[[], Any] = Watch, by_row: bool = True,
         **settings: Any) -> tuple[Tensor, RunReport, Any]:  # fmt: skip
    """Chunk by chunk, two branches in one batch -> latents, the report, and what watched the loop."""
    adapter, schedule, levels = SkyReelsAdapter(network), ChunkSchedule(frames, 3, steps, 3, window, prefix=given), flow_sigmas(steps)
    light, device = GivenNoise(20 if given else 0), texts.device
    budget = Compressor(kv, 2.0, **settings).budget_for(adapter, schedule, (SIDE, SIDE), 24, 2, 4) if kv else None
    noise = torch.randn(1, 16, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    with Session(adapter, schedule, levels, (SIDE, SIDE), policy=policy, budget=budget, prefix_sigma=light.sigma) as session:

        def predict(x: Tensor, chunk: Chunk) -> Tensor:
            cond, uncond = session.denoise(x.expand(2, -1, -1, -1, -1), chunk, texts, ("cond", "uncond")).chunk(2)
            return uncond + 3 * (cond - uncond)

        aside = Watch if isinstance(texts, Far) else torch.no_grad
        with aside():
            noise = noise.to(device)
            session.forecast(device)
        with around() as watch:
            out = sample_chunks(RowByRow(predict, session, watch=watch, by_row=by_row), noise, schedule, levels, UniPC(), light)
        with aside():
            session.close()
    return out, session.report, watch


RULE, MEASURES = Chunkwise(0.6, 2), ("clean", "noisy", "output", "change")
UNWATCHED: dict[str, dict[str, Any]] = {
    "uncached": {},
    "given frames": {"given": 3},
    "planned": {"policy": Planned(share=0.5)},
    "chunkwise": {"policy": RULE},
    "chunkwise residual": {"policy": Chunkwise(0.6, 2, replay="residual")},
    "target": {"policy": Target(share=0.6, warmup_steps=2)},
    "motion-plan": {"policy": Multirate(share=0.4), "steps": 16},
}
RULES: dict[str, dict[str, Any]] = {
    "chunkwise latent": {"policy": Chunkwise(0.1, 2, signature="latent")},
    "chunkwise latent residual": {"policy": Chunkwise(0.2, 2, signature="latent", replay="residual", order=0)},
    "target latent": {"policy": Target(share=0.6, warmup_steps=2, signature="latent")},
    **{f"motion {measure}": {"policy": Motion(0.6, base=RULE, coarse=0.3, min_refresh=0.0, measure=measure)} for measure in MEASURES},
    "motion latent": {"policy": Motion(0.3, base=replace(RULE, threshold=0.1, signature="latent"), coarse=0.3, min_refresh=0.0)},
    **{f"published {name}": {"policy": policy, "steps": 16} for name, policy in PRESETS.items()},
}
"""What goes by the content of the film has to ask the device."""
WATCHED: dict[str, dict[str, Any]] = {
    **RULES,
    **{f"budget {policy.name}": {"kv": policy(), "frames": 12, "steps": 3} for policy in KV_POLICIES if policy is not Salience},
    "budget soft": {"kv": Even(), "frames": 12, "steps": 3, "soft": 0.2},
    "budget of chunks": {"kv": RKV(), "frames": 12, "steps": 3, "granularity": "chunk"},
    "budget int8": {"kv": RKV(), "frames": 12, "steps": 3, "dtype": "int8"},
    "budget offloaded": {"kv": RKV(), "frames": 12, "steps": 3, "offload": True},
    "rule and history": {"kv": Even(), "frames": 12, "policy": Chunkwise(0.1, 2, signature="latent")},
    "budget and plan": {"kv": Even(), "frames": 12, "policy": Multirate(share=0.4), "steps": 16, "window": None},
}
"""These wait by design, and say how often."""


@pytest.mark.parametrize("name", UNWATCHED)
def test_nobody_waits_for_the_device(name: str, net: SkyReelsV2, texts: Tensor) -> None:
    out, report, watch = film(sent(net), Far(texts), **UNWATCHED[name])
    assert watch.waits == []
    assert report.host_syncs == 0
    assert (report.share < 1) == ("policy" in UNWATCHED[name])
    here, _, _ = film(net, texts, around=torch.no_grad, **UNWATCHED[name])
    torch.testing.assert_close(out.near, here, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", WATCHED)
def test_every_wait_is_counted(name: str, net: SkyReelsV2, texts: Tensor) -> None:
    _, report, watch = film(sent(net), Far(texts), **WATCHED[name])
    assert len(watch.waits) == report.host_syncs > 0, watch.waits
    if "published" not in name:  # at so few steps they may compute all
        assert (report.share < 1) == ("policy" in WATCHED[name])
    if name in RULES:
        assert max(watch.per_row) == 1, "however many of its chunks ask"
        assert min(watch.per_row) == 0, "where every step is computed whatever it measures"
    assert max(watch.per_row) == 1 or "offloaded" in name, "also where a chunk has become history and a rule asks"
    if "budget" in name and "offloaded" not in name:
        assert report.host_syncs == report.commits, "one a finished chunk, for where the rows lie"


@pytest.mark.parametrize("name", RULES)
def test_the_decisions_of_a_row_are_those_of_its_chunks_one_by_one(name: str, net: SkyReelsV2, texts: Tensor) -> None:
    latents, report, _ = film(net, texts, around=torch.no_grad, **RULES[name])
    alone, one_by_one, _ = film(net, texts, around=torch.no_grad, by_row=False, **RULES[name])
    assert one_by_one.host_syncs > report.host_syncs, "several chunks of a row ask"
    assert torch.equal(latents, alone)
    assert (report.map == one_by_one.map).all()
    assert (report.drift == one_by_one.drift).all()
    assert (report.shares == one_by_one.shares).all()


class Beside(Side):
    """Copies as on CUDA: none waits, and the host only where it asks for a mark. `asked`: how often it has."""

    asked: ClassVar[int] = 0

    def copy(self, to: Tensor, source: Tensor, after: Mark) -> Mark:
        with _disable_current_modes():
            to.copy_(source)
        return self

    def fetch(self, tensor: Tensor) -> Fetched:
        with _disable_current_modes():
            return Fetched(tensor.cpu(), self)

    def synchronize(self) -> None:
        Beside.asked += 1


@pytest.mark.parametrize(("dtype", "offload"), [("as computed", False), ("int8", True)])
def test_the_host_waits_once_a_finished_chunk_wherever_history_lies(
    net: SkyReelsV2, texts: Tensor, monkeypatch: pytest.MonkeyPatch, dtype: str, offload: bool
) -> None:
    monkeypatch.setattr(Beside, "asked", 0)
    for module in (transfer, stored):
        monkeypatch.setattr(module, "side_of", Beside)
    _, report, watch = film(sent(net), Far(texts), kv=KeyNorm(), frames=12, steps=2, dtype=dtype, offload=offload)
    assert watch.waits == []
    assert Beside.asked == report.host_syncs == report.commits > 0


def test_every_wait_is_counted_with_a_learnt_score(net: SkyReelsV2, texts: Tensor, tmp_path: Path) -> None:
    info = HeadInfo(net.config.layers, net.config.dim, 16, 3, "tiny", "0" * 64, "tiny, bidirectional", 1, "Apache-2.0")
    SalienceHead(info).save(tmp_path / "head.safetensors")
    _, report, watch = film(sent(net), Far(texts), kv=Salience(str(tmp_path / "head.safetensors")), frames=12, steps=3)
    assert len(watch.waits) == report.host_syncs == report.commits > 0, watch.waits


def test_nobody_waits_in_bidirectional_sections(net: SkyReelsV2, texts: Tensor) -> None:
    """Given frames are shown with fresh noise in every row."""
    sections, levels = sections_of(9, 3, 8, 3, 6, 3, prefix=2, suffix=1), flow_sigmas(8)
    session = SectionSession(SkyReelsAdapter(sent(net)), sections, (SIDE, SIDE), policy=Planned(share=0.6))

    def predict(part: Tensor, sigmas: tuple[float, ...], row: Row) -> Tensor:
        return session.denoise(part, sigmas, there[:1], ("cond",))

    there, noise = Far(texts), Far(torch.randn(1, 16, 9, SIDE, SIDE))
    with Watch() as watch, session:
        sample_sections(DrivenSections(predict, session), noise, sections, levels, UniPC(), GivenNoise(20))
    assert watch.waits == []


class Refused:
    """On CUDA PyTorch raises an error where the host would wait; with `allowed` it warns, and the warnings are counted. Waits for an event,
    of which PyTorch does not warn, are warned of here."""

    def __init__(self, allowed: bool = False) -> None:
        self._mode, self._caught = "warn" if allowed else "error", warnings.catch_warnings(record=True)
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> list[Any]:
        wait = torch.cuda.Event.synchronize

        def warned(event: torch.cuda.Event) -> None:
            warnings.warn("synchronizing with an event", stacklevel=2)
            wait(event)

        caught = self._caught.__enter__()
        warnings.simplefilter("always")
        self._patch.setattr(torch.cuda.Event, "synchronize", warned)
        torch.cuda.set_sync_debug_mode(self._mode)
        return caught

    def __exit__(self, *error: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._patch.undo()
        self._caught.__exit__(*error)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", [*UNWATCHED, *WATCHED])
def test_on_cuda_too(name: str, net: SkyReelsV2, texts: Tensor) -> None:
    there, context = copy.deepcopy(net).cuda(), texts.cuda()
    case, watched = {**UNWATCHED, **WATCHED}[name], name in WATCHED
    film(there, context, around=torch.no_grad, **case)  # what PyTorch sets up once is not ours
    _, report, caught = film(there, context, around=lambda: Refused(watched), **case)
    assert sum("synchronizing" in str(one.message) for one in caught) == report.host_syncs
    assert (report.host_syncs > 0) == watched


def test_what_was_fetched_so_far_arrives_in_one_wait() -> None:
    sent = [torch.arange(6).view(2, 3), torch.tensor([0.5, 2.5]), torch.tensor([True]), torch.randn(3, dtype=torch.float64)]
    inbox, watch = Inbox(), Watch()
    with watch:
        fetched = [inbox.fetch(Far(tensor)) for tensor in sent]
        later = [inbox.get(one) for one in fetched[::-1]][::-1]
        last = inbox.get(inbox.fetch(Far(sent[0])))
    assert len(watch.waits) == inbox.waits == 2
    for arrived, tensor in zip((*later, last), (*sent, sent[0]), strict=True):
        assert torch.equal(arrived, tensor)
        assert arrived.dtype == tensor.dtype


def test_the_pretended_device_sees_waits() -> None:
    x, watch = Far(torch.arange(6.0)), Watch()
    with watch:
        asked = (lambda: float(x.sum()), lambda: x.nonzero(), lambda: x.cpu(), lambda: x[x > 2], lambda: x + torch.ones(6).to(AWAY), x.tolist,
                 lambda: bool((x > 1).all()), lambda: x.add_(1).copy_(torch.ones(6)), lambda: x.repeat_interleave(x.long()))  # fmt: skip
        for number, ask in enumerate(asked, 1):
            ask()
            assert len(watch.waits) == number, watch.waits
        y = (x * 2).relu_() + torch.ones(6).to(AWAY, non_blocking=True) + torch.full((6,), 2.0, device=AWAY) + torch.tensor(1.0)
        assert len(watch.waits) == len(asked)
        with pytest.raises(AssertionError, match="on two devices"):
            y.add(torch.ones(6))
        with pytest.raises(AssertionError, match="made from numbers of the host"):
            y.add(torch.tensor([1, 2], device=AWAY))

"""A film of ours that several devices make: which MODEL and guider they can share, and the processes beside the host."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import torch

from ..flowcache_core.run.lead import Leader
from ..flowcache_core.run.run import Run
from ..flowcache_core.run.states import States
from ..flowcache_core.run.team import Source, Team
from .gguf import SUFFIX
from .guidance import conds_of, evaluates_every_text
from .host_model import HostModel
from .other_nodes import blocks_of, made_by
from .settings_on_model import DEVICES_NODE, OPTIONS, devices_of
from .texts import named_branches

NODE = DEVICES_NODE
PATCHED = {
    "patches": "a LoRA or another patch of weights",
    "hook_patches": "a hook that changes weights",
    "weight_wrapper_patches": "a node that wraps weights",
    "injections": "a node that injects something into the model",
}
"""What other nodes put on a MODEL, which a network that was loaded from the same file does not have -> its name for people."""
_teams: dict[tuple[str, ...], Team] = {}
"""By their devices; at most one of them runs."""


def named(device: torch.device) -> str:
    """As torch names it; a card with its number."""
    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}" if device.type == "cuda" else device.type


def require_place(patcher: Any, devices: Sequence[str]) -> None:
    """Raises ValueError for a MODEL that is no longer on the first of the devices."""
    if (mine := named(patcher.load_device)) != devices[0]:
        raise ValueError(
            f"{NODE} was given this MODEL on {devices[0]}, and it was moved to {mine} behind it: put the node that selects the device of the MODEL "
            f"before {NODE}"
        )


def require_reproducible(patcher: Any, model: HostModel) -> None:
    """Raises ValueError for a MODEL that other processes cannot load from its file, and says why."""
    if why := next(_not_reproduced(patcher, model), None):
        raise ValueError(f"{NODE}: the other devices load the network from its file, and {why}: bypass {NODE}, or that node")


def _not_reproduced(patcher: Any, model: HostModel) -> Iterator[str]:
    for name, what in PATCHED.items():
        if getattr(patcher, name, None):
            yield f"this MODEL has {what}"
    if any(path.suffix.lower() == SUFFIX for path in model.files):
        yield "this one is a GGUF file, which the node pack for GGUF alone can compute"
    if not model.files:
        yield "this MODEL comes from none"
    if getattr(model.model_config, "quant_config", None):
        yield "this one holds scaled 8-bit weights, which ComfyUI multiplies in its own way"
    if blocks := blocks_of(patcher.model_options.get("transformer_options", {})):
        yield f"{made_by(next(iter(blocks.values())))} replaces blocks of this MODEL"


@contextmanager
def shared(run: Run, guider: Any, model: HostModel, states: States | None) -> Iterator[tuple[Run, Leader | None]]:
    """Until the block ends: the run of this device, and who leads the others; the run itself where the MODEL asks for one device. `states`: where the
    film will be saved, if it is.

    Raises ValueError, before a process is started or weights are moved, for what cannot be shared.
    """
    devices = devices_of(guider.model_options)
    if not devices:
        yield run, None
        return
    patcher = guider.model_patcher
    require_place(patcher, devices)
    require_reproducible(patcher, model)
    if any(one.get("hooks") is not None for many in guider.conds.values() for one in many):
        raise ValueError(f"{NODE}: a text has hooks, which change weights that the other devices do not change: bypass {NODE}, or that node")
    team, source = _team(devices), Source(model.files[0], model.files, model.family.name, model.dtype_of(patcher))
    names = _branches(guider, model)
    with team.sharing(run, source, names, evaluates_every_text(guider), _check, states) as leader:
        loaded = max(team.loaded)
        what = f"loaded the network in {loaded:.1f} s" if loaded else "had the network already"
        logging.info(f"FlowCache: {len(devices)} devices share this film; the other {len(devices) - 1} {what}")
        yield leader.run, leader


def _branches(guider: Any, model: HostModel) -> list[str]:
    """Names of the texts that are evaluated, in order."""
    evaluated = [id(one) for one in conds_of(guider, model.family)]
    return [name for name, some in named_branches(guider.conds).items() if id(some[0]) in evaluated]


def _check() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def _team(devices: tuple[str, ...]) -> Team:
    for other, team in _teams.items():
        if other != devices:
            team.end()
    return _teams.setdefault(devices, Team(devices))


def end_teams() -> None:
    """Ends all processes that are in no film, and gives back what they hold."""
    for team in _teams.values():
        if not team.busy:
            team.end()


def give_back_with(patcher: Any) -> Any:
    """The MODEL; where the host unloads its weights, as it does when it is asked to free memory, the processes beside it end."""
    patcher.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_DETACH, OPTIONS, _detached)
    return patcher


def _detached(patcher: Any, unpatch_all: bool) -> None:
    """The host detaches a MODEL too, and keeps its weights, where another with the same ones takes its place."""
    if unpatch_all:
        end_teams()

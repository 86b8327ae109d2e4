"""Where the states of runs lie in the host, and what a film depends on there: texts, the guider, the model's files and what is patched onto it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
import torch

from ..flowcache_core.kv.cache import Branches
from ..flowcache_core.run.identity import digest
from ..flowcache_core.run.states import States
from ..flowcache_core.run.turn import WrappedTurn
from .host_model import HostModel
from .settings_on_model import OPTIONS
from .texts import named_branches

FOLDER = "flowcache_states"
"""In the output folder: what is in the temporary one is deleted when the host starts."""
HOOKS = ("hooks", "registered_hooks")
"""Keys of a conditioning, and of model options, under which the host keeps hooks."""


def states_of(every: int, guider: Any, model: HostModel) -> States | None:
    """None where nothing is to be saved."""
    return States(Path(folder_paths.get_output_directory(), FOLDER), every, film_of(guider, model)) if every else None


def film_of(guider: Any, model: HostModel) -> dict[str, object]:
    """By name, what no run knows of its film."""
    patcher, names = guider.model_patcher, ("patches", "object_patches", "weight_wrapper_patches", "hook_patches")
    return {
        **{f"conditioning {name}": _of_texts(some) for name, some in named_branches(guider.conds).items()},
        "guider": type(guider).__qualname__,
        **{f"guider: {name}": value for name, value in vars(guider).items() if isinstance(value, bool | int | float | str)},
        "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in model.files],
        "dtype": str(model.dtype_of(patcher)),
        "LoRAs and other patches": digest([getattr(patcher, name, None) for name in names]),
        "other settings on the model": digest(_others(guider.model_options)),
    }


def _of_texts(texts: Sequence[Mapping[str, Any]]) -> str:
    some = [_as_set(one) for one in texts]
    return digest(some[0] if len(some) == 1 else some)


def _as_set(values: Mapping[str, Any]) -> dict[str, Any]:
    """With hooks as they were set: during a run the host notes in them how far it is."""
    hooks = {name: [_hook(one) for one in values[name].hooks] for name in HOOKS if values.get(name) is not None}
    return {**values, **hooks}


def _hook(hook: Any) -> list[Any]:
    keyframes = [[one.strength, one.start_percent, one.guarantee_steps] for one in hook.hook_keyframe.keyframes]
    return [type(hook).__qualname__, {**vars(hook), "hook_keyframe": keyframes}]


def _others(model_options: Mapping[str, Any]) -> dict[str, Any]:
    """Without ours, which a run names one by one."""
    options = {name: value for name, value in model_options.get("transformer_options", {}).items() if name != OPTIONS}
    return {**_as_set(model_options), "transformer_options": options}


@dataclass(frozen=True)
class NamedTurn(WrappedTurn):
    """A turn whose branches the host calls by UUIDs, which are others in every process. `names`: of the texts that count in this turn."""

    names: Mapping[Hashable, str]

    def unwritten(self, branches: Iterable[Hashable]) -> tuple[Hashable, ...]:
        uuids = {name: branch for branch, name in self.names.items()}
        return tuple(uuids.get(name, name) for name in self.turn.unwritten(self.names[branch] for branch in branches if branch in self.names))

    def denoise(self, x: torch.Tensor, context: torch.Tensor, branches: Branches, blocks: Hashable = None, texts: Hashable = None) -> torch.Tensor:
        return self.turn.denoise(x, context, tuple(self.names.get(branch, branch) for branch in branches), blocks, branches)

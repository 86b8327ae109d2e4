"""An account of every storage that operations make."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Storages are entered when an operation returns them, and struck out when nothing holds them any more."""

    def __init__(self, *known: Tensor) -> None:
        """`known`: what was there before and belongs to no run."""
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.enter(tensor)
        return out

    def enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known and storage._cdata not in self._alive:
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def held(self, *but: Tensor) -> int:
        """Bytes that are alive, without those of `but`."""
        without = {tensor.untyped_storage()._cdata for tensor in but}
        self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
        return sum(size for key, (_, size) in self._alive.items() if key not in without)


class Peak(Ledger):
    """The most that was alive after any operation."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.most = max(self.most, self.held())
        return out

"""Peak memory of a call, on the GPU from the allocator and on the CPU by watching every tensor
made.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _CpuPeak(TorchDispatchMode):
    """Sums the bytes of the storages that operators return while they are alive; views count
    once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes_now = 0
        self.peak_bytes = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,  # torch's own annotation of it lacks the operator's name
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_cpu(t)}
        if func.namespace == "gold_kernels":
            # An operator runs without this mode: call what it is made of, with the mode. Torch has
            # no public way to it.
            from torch._library.custom_ops import OPDEFS

            with self:
                return OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _is_cpu(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.seen:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.bytes_now += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.bytes_now)
        weakref.finalize(storage, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self.seen.discard(key)
        self.bytes_now -= num_bytes


def _is_cpu(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False  # a sparse tensor has no storage of its own
    return value.device.type == "cpu"


def peak_extra_bytes(function: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Peak bytes allocated above what is allocated when function starts; its result is dropped at
    the end.

    On the CPU, temporaries inside one torch operator are not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _CpuPeak() as watch:
        function()
    return watch.peak_bytes

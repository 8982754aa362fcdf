"""A training step without memory: its tensors have shapes and no numbers, and are counted.

Models are on the meta device. Ids, masks, positions, grids of pictures and their pixels stay real,
on the CPU, until they meet a weight: what a model does depends on them.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META, CPU = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten
# What torch works out for the meta device in Python, in half a millisecond a call.
POINTWISE = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor}
RANGES = ("aten::arange", "aten::linspace")  # positions, of floats too
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_")


class Ledger(TorchDispatchMode):
    """Counts the bytes of the storages that operators return while they are alive, by the label
    that is set when they are made; views count once. What lies inside one operator is not seen, but
    for what `inside` says of it.
    """

    def __init__(self, inside: Callable[[Any, dict[str, Any]], int]) -> None:
        super().__init__()
        self.inside = inside  # bytes that an operator of gold_kernels takes meanwhile
        self.label = "activations"
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.labels: dict[int, tuple[str, int]] = {}  # of storages

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    @property
    def total(self) -> int:
        return self.now.total()

    def relabel(self, tensor: Tensor, label: str) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self.labels:
            before, num_bytes = self.labels[key]
            self.labels[key] = label, num_bytes
            self.now[before] -= num_bytes
            self.now[label] += num_bytes

    def add(self, label: str, num_bytes: int) -> None:
        """Memory that no tensor here has; negative to take it back."""
        self.now[label] += num_bytes
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((args, kwargs.values())))
        given = args, kwargs
        args, kwargs = _placed(func, tensors, args, kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        is_plain = func in POINTWISE and not kwargs and any(not is_real(t) for t in tensors)
        result = _pointwise(*args) if is_plain else func(*args, **kwargs)
        for tensor in _tensors((result,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in known and storage._cdata not in self.labels:
                self._add(storage)
        if func.namespace == "gold_kernels":
            names = [argument.name for argument in func._schema.arguments]
            # as they came: sizes of buffers may follow from numbers that are known
            extra = self.inside(func, dict(zip(names, given[0], strict=False)) | given[1])
            self.add("loss", extra)
            self.add("loss", -extra)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        self.labels[key] = self.label, num_bytes
        self.add(self.label, num_bytes)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        label, num_bytes = self.labels.pop(key)
        self.now[label] -= num_bytes


def _pointwise(*operands: Any) -> Tensor:
    """A result in the layout of the operand that has its shape, as on a device."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    shape = torch.broadcast_shapes(*[tensor.shape for tensor in tensors])
    dtype = torch.result_type(*operands)
    for tensor in tensors:
        if tensor.shape == shape and not is_real(tensor):
            return torch.empty_like(tensor, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=META)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def is_real(tensor: Tensor) -> bool:
    return tensor.device.type != "meta"


def _placed(func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments on one device: the CPU where all of them are there, else meta."""
    name, device = func._schema.name, kwargs.get("device")
    are_real = all(map(is_real, tensors))
    if device is not None and device.type == "meta" and are_real:
        dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else None)
        if name in RANGES or (dtype is not None and not dtype.is_floating_point):
            return args, kwargs | {"device": CPU}
    if are_real:
        return args, kwargs
    if device is not None and device.type != "meta":
        kwargs = kwargs | {"device": META}
    if name in INDEXED:
        args = (args[0], _as_positions(args[1]), *args[2:])
    elif not any(map(is_real, tensors)):
        return args, kwargs
    return _as_meta(args), {key: _as_meta(value) for key, value in kwargs.items()}


def _as_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device=META) if is_real(value) else value
    if isinstance(value, list | tuple):
        return type(value)(map(_as_meta, value))
    return value


def _as_positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """A mask has a length that depends on its numbers, positions have not."""
    result: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and is_real(index):
            result += index.nonzero().unbind(1)
        else:
            result.append(index)
    return result

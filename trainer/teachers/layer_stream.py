"""Layers whose weights stay in host memory, or on disk, and come to the device when they run.

While a layer computes, the weights of the next AHEAD ones are copied: on a stream of their own, out
of pinned memory, into a ring of buffers that have the size of the largest layer. A layer is an
element of an outermost list of modules, such as model.layers. Everything else of a model, its head
and embeddings for instance, stays on the device. On a CPU the same code copies within its memory.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

AHEAD = 2  # layers that are copied while one computes
ALIGNMENT = 256  # bytes, between the tensors of a buffer
SMALLEST_PIECE = 1 << 20  # bytes of pinned memory


def piece_sizes(num_bytes: int) -> list[int]:
    """Powers of two that together hold num_bytes, with less than SMALLEST_PIECE left over."""
    rounded = -(-num_bytes // SMALLEST_PIECE) * SMALLEST_PIECE
    return [1 << bit for bit in reversed(range(rounded.bit_length())) if rounded >> bit & 1]


class Part(NamedTuple):
    """A parameter of a layer: who has it, and where it lies in a buffer."""

    owner: nn.Module
    name: str
    resting: nn.Parameter  # on the meta device: what the owner has while the layer does not run
    start: int  # byte

    def view(self, buffer: Tensor) -> Tensor:
        stop = self.start + self.resting.numel() * self.resting.element_size()
        return buffer[self.start : stop].view(self.resting.dtype).view(self.resting.shape)


class Layer:
    """A module whose parameters are elsewhere: in sources, each with the byte of a buffer where it
    begins, or, once they are packed, in pieces of host memory that are a buffer's bytes in order.
    """

    def __init__(
        self,
        module: nn.Module,
        is_resident: Callable[[nn.Parameter], bool],
        stored: Mapping[nn.Parameter, Tensor],  # what to read a parameter from, if not from itself
    ) -> None:
        self.module, self.num_bytes = module, 0
        self.parts: list[Part] = []
        self.sources: dict[int, Tensor] = {}
        self.pieces: list[Tensor] = []  # uint8
        starts: dict[int, int] = {}
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is None or is_resident(parameter):
                    continue
                if id(parameter) not in starts:
                    starts[id(parameter)] = self.num_bytes
                    self.sources[self.num_bytes] = stored.get(parameter, parameter.data)
                    size = parameter.numel() * parameter.element_size()
                    self.num_bytes += -(-size // ALIGNMENT) * ALIGNMENT
                resting = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
                self.parts.append(Part(owner, name, resting, starts[id(parameter)]))

    def rest(self) -> None:
        for part in self.parts:
            part.owner._parameters[part.name] = part.resting

    def run_from(self, buffer: Tensor) -> None:
        for part in self.parts:
            part.owner._parameters[part.name] = nn.Parameter(part.view(buffer), False)

    def pack(self, *, is_pinned: bool) -> None:
        """Pinned memory comes in powers of two: one piece of a layer's size could be half empty."""
        sizes = piece_sizes(self.num_bytes) if is_pinned else [self.num_bytes]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        self.fill(buffer)
        self.pieces = [piece.pin_memory() if is_pinned else piece for piece in buffer.split(sizes)]
        self.sources = {}

    def fill(self, buffer: Tensor) -> None:
        """The bytes of all parameters; a source may be stored in another dtype."""
        views = {part.start: part.view(buffer) for part in self.parts}
        for start, source in self.sources.items():
            views[start].copy_(source)
        start = 0
        for piece in self.pieces:
            stop = min(start + len(piece), len(buffer))
            buffer[start:stop].copy_(piece[: stop - start], non_blocking=True)
            start = stop


class Slot:
    """A buffer of the ring, with the layer whose weights are in it, or on their way."""

    def __init__(self, num_bytes: int, device: torch.device, staging: Tensor | None) -> None:
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.staging = staging
        self.layer: Layer | None = None
        self.is_running = False
        self.filled: Future | None = None
        has_events = device.type == "cuda"
        self.ready = torch.cuda.Event() if has_events else None  # the copy has ended
        self.free = torch.cuda.Event() if has_events else None  # the layer has ended


def outermost_lists(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules that are in no other list, by name."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield prefix + name, child
        else:
            yield from outermost_lists(child, f"{prefix}{name}.")


def split_layers(model: nn.Module, stored: Mapping[nn.Parameter, Tensor]) -> list[Layer]:
    """The layers, in the order in which the model names them. A parameter that others use too, an
    embedding for instance, is none of theirs.
    """
    modules = {id(layer): layer for _, layers in outermost_lists(model) for layer in layers}
    inside = {id(module) for layer in modules.values() for module in layer.modules()}
    outside = {
        id(parameter)
        for module in model.modules()
        if id(module) not in inside
        for parameter in module._parameters.values()
    }
    layers = [Layer(module, lambda p: id(p) in outside, stored) for module in modules.values()]
    return [layer for layer in layers if layer.num_bytes]


class LayerStream:
    def __init__(self, layers: list[Layer], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.is_cuda = device.type == "cuda"
        self.num_bytes = max(layer.num_bytes for layer in layers)
        self.copying = torch.cuda.Stream(device) if self.is_cuda else None
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="teacher_offload")
        self.has_staging = self.is_cuda and not all(layer.pieces for layer in layers)
        self.staging: list[Tensor] = []
        self.slots: list[Slot] = []
        self.first = layers[0]
        self.next: dict[Layer, Layer] = dict(pairwise(layers))
        self.last: Layer | None = None
        self.seen: set[Layer] = set()
        self.is_repeating = False
        for layer in layers:
            layer.rest()
            layer.module.register_forward_pre_hook(lambda *_call, its=layer: self._start(its))
            layer.module.register_forward_hook(
                lambda *_call, its=layer: self._end(its), always_call=True
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """The layers can run. Buffers on the device exist within this context alone."""
        if self.slots:  # within the context already
            yield
            return
        self.slots = [self._new_slot(i) for i in range(1 + AHEAD)]
        self.last, self.is_repeating = None, False
        self.seen.clear()
        try:
            self._fetch_ahead(self.first)
            yield
        finally:
            for slot in self.slots:
                if slot.filled is not None:
                    slot.filled.result()
            if self.copying is not None:  # the buffers' memory is anybody's from here on
                torch.cuda.current_stream(self.device).wait_stream(self.copying)
            self.slots = []

    def _new_slot(self, index: int) -> Slot:
        if self.has_staging and index == len(self.staging):
            self.staging.append(torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=True))
        slot = Slot(self.num_bytes, self.device, self.staging[index] if self.has_staging else None)
        if slot.free is not None:  # what had this memory before has ended
            slot.free.record(torch.cuda.current_stream(self.device))
        return slot

    def _start(self, layer: Layer) -> None:
        assert self.slots, "an offloaded teacher runs within LayerStream.running()"
        self._learn_order(layer)
        slot = self._slot_of(layer) or self._fetch(layer)
        assert slot is not None and slot.filled is not None, "there is a slot for a layer that runs"
        slot.filled.result()
        if slot.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
        slot.is_running = True
        layer.run_from(slot.buffer)
        if layer in self.next:
            self._fetch_ahead(self.next[layer])

    def _end(self, layer: Layer) -> None:
        slot = self._slot_of(layer)
        if slot is None or not slot.is_running:  # it failed before it began
            return
        layer.rest()
        slot.is_running = False
        if slot.free is not None:
            slot.free.record(torch.cuda.current_stream(self.device))

    def _learn_order(self, layer: Layer) -> None:
        """What follows a layer is what followed it the last time."""
        if self.last is None:
            self.first = layer
        else:
            self.next[self.last] = layer
        self.is_repeating |= layer in self.seen
        self.seen.add(layer)
        self.last = layer

    def _fetch_ahead(self, layer: Layer) -> None:
        """The next AHEAD layers from this one on; from the start again only where that is known to
        happen, as in generate().
        """
        wanted = [layer]
        while len(wanted) < AHEAD and wanted[-1] in self.next:
            wanted.append(self.next[wanted[-1]])
        if not self.is_repeating:
            wanted = [layer for layer in wanted if layer not in self.seen]
        for layer in wanted:
            if self._slot_of(layer) is None:
                self._fetch(layer, keep=wanted)

    def _slot_of(self, layer: Layer) -> Slot | None:
        return next((slot for slot in self.slots if slot.layer is layer), None)

    def _fetch(self, layer: Layer, keep: list[Layer] | None = None) -> Slot | None:
        """Begin to fill a slot. With keep, none that holds one of them; there may be none then."""
        kept = keep or ()
        free = [slot for slot in self.slots if not slot.is_running and slot.layer not in kept]
        if not free and keep is not None:
            return None
        if not free:  # layers that call one another
            self.slots.append(self._new_slot(len(self.slots)))
            free = self.slots[-1:]
        slot = free[0]  # the one that was filled first
        self.slots.remove(slot)
        self.slots.append(slot)
        if slot.filled is not None:
            slot.filled.result()
        slot.layer = layer
        slot.filled = self.worker.submit(self._fill, slot, layer)
        return slot

    @torch.no_grad()
    def _fill(self, slot: Slot, layer: Layer) -> None:
        """Runs in the worker: reading from disk, and copies from memory that is not pinned,
        wait.
        """
        if slot.ready is None or slot.free is None or self.copying is None:
            layer.fill(slot.buffer)
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self.copying):
            self.copying.wait_event(slot.free)
            if layer.pieces:
                layer.fill(slot.buffer)
            else:
                assert slot.staging is not None, "a slot on a GPU has a pinned buffer"
                slot.ready.synchronize()  # the copy before it, out of this staging buffer
                layer.fill(slot.staging)
                slot.buffer.copy_(slot.staging, non_blocking=True)
            slot.ready.record(self.copying)

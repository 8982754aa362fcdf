"""Completions from a cache of fixed size: one decoding step, again and again.

All tensors of a step have fixed places, and nothing in it waits for the device. So on a CUDA device
the step is recorded once as a graph and replayed: a token costs what its kernels cost, and not what
launching them from Python costs.

B rows, R most new tokens, V entries of the head.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import logging

from gold_trainer.data.row_errors import first_line
from gold_trainer.writers.compiled_layers import Within
from gold_trainer.writers.fixed_cache import Batch
from gold_trainer.writers.prefill import CannotDecode, Prefilled
from gold_trainer.writers.sampling import Sampler

logger = logging.get_logger(__name__)

# What another kernel makes of the logits, in parts of their spread: of 16 bits, of 32.
MAX_ERROR = 0.1, 1e-3
# Steps of a row that have to be saved: on an H200 one is 0.02 ms of a 2B model's step, which takes
# 0.1 s to begin anew. Both grow with the model.
WORTH_RECORDING = 8192
SPARE_BYTES = 2**30  # of the device, for what a recorded step keeps beside the cache
CHECK_EVERY = 16  # steps between two looks at which rows have ended: each look waits for the device


def next_logits(base: Any, batch: Batch, within: Within = nullcontext) -> Tensor:
    """(B, V) of the token behind the last one, which goes into the cache."""
    inputs = base.prepare_inputs_for_generation(
        batch.token,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        **{batch.cache_name: Cache(layers=[*batch.layers])},
        **batch.type_ids,
        **batch.options,
    )
    with within(batch):
        logits: Tensor = base(**inputs, return_dict=True).logits[:, -1]
    batch.position.add_(1)
    batch.positions.add_(1)
    return logits


def check_step(base: Any, part: Prefilled, within: Within = nullcontext) -> None:
    """CannotDecode where a step with the fixed cache is not one with the model's own."""
    assert part.next_logits is not None, "the part went on"
    num_rows, width = part.input_ids.shape
    batch = Batch.empty(part, [1] * num_rows, width)
    batch.fill(0, part, torch.arange(num_rows, device=part.logits.device))
    batch.token.copy_(part.logits.argmax(-1, keepdim=True))
    expected = part.next_logits.float()
    actual = next_logits(base, batch, within).float()
    error = (actual - expected).square().mean().sqrt()
    sizes = [t.element_size() for t in (part.next_logits, *part.layers[0])]
    limit = MAX_ERROR[min(sizes) >= 4] * expected.std()
    if not error <= limit:
        raise CannotDecode("with it the next token would be another")


def recorded(step: Callable[[], None]) -> Any:
    """A CUDA graph of it. torch.cuda.graph would wait for the device and give the allocator's free
    memory back before; here the device works on.
    """
    if torch.cuda.mem_get_info()[0] < SPARE_BYTES:
        torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_stream(torch.cuda.current_device())):
        graph.capture_begin()
        try:
            step()
        finally:
            graph.capture_end()
    return graph


@cache
def _stream(device: int) -> Any:
    """One for all: cuBLAS keeps memory for each."""
    return torch.cuda.Stream(device)


class Decoder:
    """Writes the rows of a batch to their ends. Rows that have ended leave it."""

    def __init__(
        self,
        base: Any,  # a transformers model
        batch: Batch,
        sampler: Sampler,
        *,
        has_ended: Callable[[list[int]], bool],  # what no single token says: stop strings
        is_recorded: bool,  # whether steps become a CUDA graph
        within: Within = nullcontext,  # of every step
        warm: set[tuple[int, ...]] | None = None,  # shapes whose steps have run before
        name: str = "",  # of the model, in what is told
    ) -> None:
        self.name = name or type(base).__name__
        self.warm = set() if warm is None else warm
        self.base, self.batch, self.sampler = base, batch, sampler
        self.has_ended, self.is_recorded, self.within = has_ended, is_recorded, within
        self.end_ids = torch.tensor(sampler.sampling.end_ids, device=batch.ids.device)
        self.written: dict[int, tuple[list[int], list[float]]] = {}
        self.rows = list(range(len(batch.ids)))  # of the batch that was given
        self.graph: Any = None
        self.record_seconds = 0.0
        self.num_steps = 0

    def write(self, logits: Tensor) -> list[tuple[list[int], list[float]]]:  # (B, V)
        """Ids and log-probabilities of every row, with what stands behind its end."""
        self._take(logits)
        written, room = 1, self.batch.ids.shape[1]
        if room > 1:
            self._get_ready()  # before the first look at what is written, which waits for it
        self._leave(written, is_last=room == 1)
        while self.rows:
            num_steps = min(CHECK_EVERY, room - written)
            for _ in range(num_steps):
                self._advance()
            written += num_steps
            self._leave(written, is_last=written == room)
        self.graph = None
        return [self.written[row] for row in range(len(self.written))]

    def _take(self, logits: Tensor) -> None:
        """The next token of every row."""
        batch = self.batch
        ids, logprobs = self.sampler(logits, batch.count)
        batch.ids.index_copy_(1, batch.count, ids[:, None])
        batch.logprobs.index_copy_(1, batch.count, logprobs[:, None])
        batch.token.copy_(ids[:, None])
        batch.count.add_(1)
        has_end = (ids[:, None] == self.end_ids).any(-1)
        batch.is_done.logical_or_(has_end | (batch.count >= batch.rooms))

    def _step(self) -> None:
        self._take(next_logits(self.base, self.batch, self.within))

    def _advance(self) -> None:
        self.num_steps += 1
        self._get_ready()
        if self.graph is not None:
            self.graph.replay()
            return
        self._step()  # eager, which warms libraries up and compiles what is not compiled yet
        self.warm.add(self._shape())
        self._get_ready()

    def _shape(self) -> tuple[int, ...]:
        return tuple(self.batch.layers[0].keys.shape)

    def _get_ready(self) -> None:
        """Record the step where one of its shape has run before: that needs the host alone."""
        if self.graph is None and self.is_recorded and self._shape() in self.warm:
            self._record()

    def _record(self) -> None:
        started = time.perf_counter()
        try:
            graph = recorded(self._step)
        except (RuntimeError, ValueError) as error:
            self.is_recorded = False
            logger.warning(
                "%s writes without a CUDA graph, which costs time: its decoding step cannot be "
                "recorded (%s).",
                self.name,
                first_line(error),
            )
        else:
            self.graph = graph
        self.record_seconds += time.perf_counter() - started

    def _leave(self, written: int, *, is_last: bool) -> None:
        """Rows that have ended leave, where that makes the steps to come cheaper."""
        is_done = self.batch.is_done.tolist()
        if self.sampler.sampling.stop_strings:
            ids = self.batch.ids[:, :written].tolist()
            is_done = [d or self.has_ended(i) for d, i in zip(is_done, ids, strict=True)]
            self.batch.is_done.copy_(torch.tensor(is_done))
        leaving = [i for i, done in enumerate(is_done) if done or is_last]
        to_come = self.batch.ids.shape[1] - written
        if len(leaving) < len(is_done) and not self._pays(len(leaving), to_come):
            return
        index = torch.tensor(leaving, device=self.batch.ids.device, dtype=torch.int64)
        ids = self.batch.ids[index, :written].tolist()
        logprobs = self.batch.logprobs[index, :written].tolist()
        for place, *texts in zip(leaving, ids, logprobs, strict=True):
            self.written[self.rows[place]] = texts[0], texts[1]
        staying = [i for i in range(len(is_done)) if i not in set(leaving)]
        self.rows = [self.rows[i] for i in staying]
        if leaving and staying:
            self.graph = None  # before the places that it knows
            index = torch.tensor(staying, device=self.batch.ids.device)
            self.batch = self.batch.keep(index)
            self.sampler.keep(index)

    def _pays(self, num_leaving: int, steps_to_come: int) -> bool:
        """A smaller batch takes a first step without a graph, and is recorded anew."""
        if not self.is_recorded:
            return num_leaving > 0
        return num_leaving * steps_to_come >= WORTH_RECORDING

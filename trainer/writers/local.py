"""Completions of a model in this process."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers.utils import logging

from gold_trainer import sharding
from gold_trainer.batches import Example, PromptTensors
from gold_trainer.config import GOLDConfig
from gold_trainer.data.row_errors import first_line
from gold_trainer.models import base_model, is_offloaded, may_pad_left
from gold_trainer.rendering.collator import GOLDCollator
from gold_trainer.rendering.prompts import process_examples
from gold_trainer.speed.compile_note import CompileNote
from gold_trainer.speed.on_host import moved, pinned, sent
from gold_trainer.writers.cast_weights import cast_weights
from gold_trainer.writers.compiled_layers import CompiledLayers, decoder_layers
from gold_trainer.writers.decoding import Decoder, check_step
from gold_trainer.writers.fast_prefill import FastPrefill
from gold_trainer.writers.fixed_cache import Batch, cache_length
from gold_trainer.writers.generating import generate, writing_mode
from gold_trainer.writers.prefill import CannotDecode, Prefilled, prefill
from gold_trainer.writers.sampling import Sampler
from gold_trainer.writers.writer import Completion, Prompt, Sampling, Writer, has_stop

logger = logging.get_logger(__name__)

PREFILL_TOKENS = 32768  # of prompts at a time, padding included: what their activations may take
GIB = 2**30
COMPILER: str | Callable = "inductor"
CPU_CACHE_GIB = 4.0


class LocalWriter(Writer):
    """Its steps are recorded as a graph where the device can, and its cache is gone when a call
    ends. A model that keeps more than keys and values is written by its own generate().
    """

    runs_together = True  # where its weights are in parts

    def __init__(
        self,
        writing: Callable[[], AbstractContextManager[nn.Module]],  # the model, ready to write
        collator: GOLDCollator,  # of the side whose prompts these are
        args: GOLDConfig,
        side: str = "student",
        note: CompileNote | None = None,
    ) -> None:
        self.writing, self.collator, self.args = writing, collator, args
        self.side, self.note = side, note or CompileNote()
        self.version = 0
        self.refusal: str | None = None  # why generate() writes, once it is known
        self.bytes_per_token = 0  # of the cache, for one row; 0: not known yet
        self.is_told = False
        self.compiled: CompiledLayers | None = None
        self.made: PromptTensors | None = None  # of the next call's first prompts, or the last's
        self.most_rows: int | None = None  # that the cache held first in the last call; None: all
        self.fast: FastPrefill | None = None
        self.warm: set[tuple[int, ...]] = set()
        self.compile_seconds = self.record_seconds = 0.0  # of all calls

    def _name(self, base: Any) -> str:
        """The model's name in messages: both sides may be of one class."""
        own = type(base).__name__
        return own if self.side == "student" else f"{own} of the {self.side}"

    def sync_weights(self, model: nn.Module | None, step: int) -> None:
        self.version = step

    def look_ahead(self, prompts: Sequence[Prompt]) -> None:
        """Make tensors of the prompts that go through the model first. After the first call: before
        it nobody knows how many they are.
        """
        self.made = None
        if not prompts or self.refusal is not None or not self.bytes_per_token:
            return
        rows = _rows_of(prompts)
        _, examples, _ = next(_parts(rows[: self.most_rows]))
        with suppress(Exception):  # the step that is computed goes on: its own call has it again
            self._make(examples)

    def take_made(self) -> PromptTensors | None:
        made, self.made = self.made, None
        return made

    def close(self) -> None:
        self.made = None

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        rows = _rows_of(prompts)
        completed: dict[int, Completion] = {}
        with self.writing() as model:
            groups = [list(range(len(rows)))]
            if not may_pad_left(model):
                lengths = [row.example.prompt_length for row in rows]
                groups = [
                    [i for i, other in enumerate(lengths) if other == length]
                    for length in dict.fromkeys(lengths)
                ]
            for number in range(sharding.num_calls(model, len(groups), self.args.device)):
                # a rank that has written all writes again, and drops it
                group = groups[number % len(groups)]
                written = self.write_rows(model, [rows[i] for i in group], sampling)
                completed = dict(zip(group, written, strict=True)) | completed
        tokenizer = self.collator.tokenizer
        in_order = (completed[i].kept(row, sampling, tokenizer) for i, row in enumerate(rows))
        return [list(islice(in_order, prompt.num_completions)) for prompt in prompts]

    def write_rows(
        self,
        model: nn.Module,
        rows: Sequence[Prompt],  # of one completion each, with prompts that may be padded together
        sampling: Sampling,
    ) -> list[Completion]:
        """Completions with whatever the batch has behind a row's end."""
        reason = self.refusal or _reason_to_generate(model, sampling)
        if reason is None:
            try:
                return self._decode(base_model(model), rows, sampling)
            except CannotDecode as error:
                reason = str(error)
        if self.refusal is None:
            self.refusal = reason
            logger.warning(
                "%s writes completions with generate(), which is slower than a cache of fixed "
                "size: %s.",
                self._name(base_model(model)),
                reason,
            )
        inputs = self._inputs([row.example for row in rows])
        ids, logprobs = generate(model, inputs, rows, sampling, self.collator.tokenizer)
        pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
        return [Completion(*pair, self.version) for pair in pairs]

    def _make(self, examples: Sequence[Example]) -> None:
        self.made = None  # before there are others
        processor = self.collator.processor
        tensors = process_examples(processor, examples)
        tensors = {name: pinned(tensor, self.args) for name, tensor in tensors.items()}
        self.made = PromptTensors(processor, list(examples), tensors)

    def _inputs(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        if self.made is None or not self.made.are_of(self.collator.processor, examples):
            self._make(examples)
        assert self.made is not None, "they were there, or are made"
        tensors = self.made.tensors
        return {name: moved(tensor, self.args.device) for name, tensor in tensors.items()}

    def _prefill(
        self, base: Any, examples: Sequence[Example], *, goes_on: bool = False
    ) -> Prefilled:
        inputs, pad_token_id = self._inputs(examples), self.collator.tokenizer.pad_token_id
        if self.fast is None:
            self.fast = FastPrefill(base, self.args, self._name(base))
        return self.fast.run(partial(prefill, base, inputs, pad_token_id, goes_on=goes_on))

    @torch.no_grad()
    def _decode(self, base: Any, rows: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Write as many rows together as the cache may hold."""
        written: list[Completion] = []
        device = self.args.device
        with writing_mode(base), cast_weights(base, device), uncached_autocast(device):
            if not self.bytes_per_token or not self._is_checked(len(rows)):
                self._try(base, rows)
            while len(written) < len(rows):
                waiting = rows[len(written) :]
                number = self._rows_at_a_time(waiting)
                if not written:
                    self.most_rows = number if number < len(rows) else None
                written += self._write(base, waiting[:number], sampling)
        return written

    def _is_checked(self, num_rows: int) -> bool:
        return self.compiled is None or self.compiled.is_checked(num_rows)

    def _try(self, base: Any, rows: Sequence[Prompt]) -> None:
        """A step of the shortest and the longest prompt: CannotDecode, or what the cache takes."""
        examples = [row.example for row in rows]
        by_length = sorted(examples, key=lambda example: example.prompt_length)
        part = self._prefill(base, [by_length[0], by_length[-1]], goes_on=True)
        check_step(base, part)
        self.bytes_per_token = part.bytes_per_token
        is_cuda = self.args.device.type == "cuda"
        if is_cuda if self.args.rollout_compile is None else self.args.rollout_compile:
            self._compile(base, part, len(rows))

    def _compile(self, base: Any, part: Prefilled, num_rows: int) -> None:
        """The layers for decoding; without them where they cannot be, or compute something else."""
        started = time.perf_counter()
        layers = decoder_layers(base, len(part.layers))
        if layers is None:
            return
        compiled = self.compiled or CompiledLayers(layers, COMPILER)
        self.note.begin()
        try:
            compiled.check(partial(check_step, base, part), num_rows)
        except Exception as error:  # whatever a compiler may raise
            logger.warning(
                "%s writes with layers that are not compiled, which costs time: %s.",
                self._name(base),
                first_line(error),
            )
        self.compiled = compiled if compiled.has_kernels or compiled.has_compiled else None
        seconds = time.perf_counter() - started
        self.compile_seconds += seconds
        self.note.end(seconds)

    def _rows_at_a_time(self, rows: Sequence[Prompt]) -> int:
        """How many of the first rows the cache has room for; one at least."""
        width = room = 0
        num_bytes = self._cache_bytes()
        for number, row in enumerate(rows):
            width, room = max(width, row.example.prompt_length), max(room, row.room)
            row_bytes = cache_length(width, room) * self.bytes_per_token
            if number and (number + 1) * row_bytes > num_bytes:
                return number
        return len(rows)

    def _cache_bytes(self) -> float:
        device = self.args.device
        if self.args.rollout_cache_gib is not None:
            return self.args.rollout_cache_gib * GIB
        if device.type != "cuda":
            return CPU_CACHE_GIB * GIB
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + kept) / 2

    def _write(self, base: Any, rows: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """Completions of rows that the cache has room for, together."""
        started = time.perf_counter()
        width, rooms = max(row.example.prompt_length for row in rows), [row.room for row in rows]
        logits, batch, sampler = [], None, None
        for start, examples, repeats in _parts(rows):
            part = self._prefill(base, examples)
            if batch is None or sampler is None:
                batch = Batch.empty(part, rooms, width)
                seeds, num_entries = [row.seed for row in rows], part.logits.shape[1]
                sampler = Sampler(sampling, seeds, max(rooms), num_entries, part.logits.device)
            index = sent(torch.repeat_interleave(torch.tensor(repeats)), part.logits.device)
            batch.fill(start, part, index)
            sampler.see(start, part.input_ids[index], part.mask[index])
            logits.append(part.logits[index])
            del part  # and its cache
        assert batch is not None and sampler is not None, "there are rows"
        decoder = Decoder(
            *(base, batch, sampler),
            has_ended=partial(has_stop, self.collator.tokenizer, sampling.stop_strings),
            is_recorded=self.args.device.type == "cuda",
            within=self.compiled or nullcontext,
            warm=self.warm,
            name=self._name(base),
        )
        pairs = decoder.write(torch.cat(logits))
        self.record_seconds += decoder.record_seconds
        self._tell(len(rows), batch, time.perf_counter() - started)
        return [Completion(*pair, self.version) for pair in pairs]

    def _tell(self, num_rows: int, batch: Batch, seconds: float) -> None:
        """Once: what a call takes."""
        if self.is_told or self.args.process_index != 0:
            return
        self.is_told = True
        once = [
            (self.compile_seconds, "compiling a layer"),
            (self.record_seconds, "recording a step"),
        ]
        first = "".join(f", {took:.1f} s {what}" for took, what in once if took)
        Console(highlight=False).print(
            f"  rollouts   {num_rows} completions together in {seconds:.1f} s{first}; cache "
            f"{batch.num_bytes / GIB:.2f} GiB, given back before learning",
            markup=False,
            soft_wrap=True,
        )


def _rows_of(prompts: Sequence[Prompt]) -> list[Prompt]:
    """A prompt for each completion."""
    return [replace(p, seed=seed, num_completions=1) for p in prompts for seed in p.seeds]


def _parts(rows: Sequence[Prompt]) -> Iterator[tuple[int, list[Example], list[int]]]:
    """Prompts that go through the model together: the first one's row, each prompt once, and how
    many rows begin with it.
    """
    width = max(row.example.prompt_length for row in rows)
    runs = [list(run) for _, run in groupby(rows, lambda row: id(row.example))]
    size = max(1, PREFILL_TOKENS // width)
    start = 0
    for first in range(0, len(runs), size):
        part = runs[first : first + size]
        repeats = [len(run) for run in part]
        yield start, [run[0].example for run in part], repeats
        start += sum(repeats)


def _reason_to_generate(model: nn.Module, sampling: Sampling) -> str | None:
    base: Any = base_model(model)
    places = getattr(base, "hf_device_map", None) or {}
    if sampling.generation_kwargs:
        return f"generation_kwargs has {', '.join(sampling.generation_kwargs)}"
    if sharding.is_sharded(model) or sharding.tp_size(model) > 1:
        return "its weights are in parts"
    if is_offloaded(base) or len(set(places.values())) > 1:
        return "its weights are in several places"
    if hasattr(model, "_hf_hook"):  # of accelerate: what goes in has to be moved first
        return "it is on another device"
    if getattr(base, "is_loaded_in_8bit", False):
        return "layers of LLM.int8 look at what comes in, which no recorded step can"
    if not may_pad_left(model):
        return "padding on the left would change what it writes"
    return None


@contextmanager
def uncached_autocast(device: torch.device) -> Iterator[None]:
    """What a recorded step casts must not be taken from a cache that is gone when it runs again."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False):
        yield

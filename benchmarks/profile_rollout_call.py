"""Where a call of the local writer spends its time: its stages, and what the host does.

    python benchmarks/profile_rollout_call.py --batch-sizes 16 4 64

The 2B shape and the prompts of bench_rollout.py, one 448 x 448 picture each, 256 new tokens. Before
each call memory is taken and given back, and the prompts become tensors, as within a step. Printed
for each number of rows: seconds of calls as they are and of what is done before, then of a call in
which the device is waited for around every stage, with what each stage took (one has those that lie
in it), and where the host is in one more, by samples of its frames. `--tiny` runs the same code on
small models anywhere.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from host_samples import HostSamples
from qwen3_vl_shapes import (
    STUDENT_2B,
    TINY_STUDENT,
    TINY_TEACHER,
    Shape,
    build_model,
    processor_of_448_pixels,
    rows,
)
from record import say
from timing import now

from gold_trainer import GOLDConfig, GOLDTrainer
from gold_trainer.speed.replacing import replaced
from gold_trainer.writers import decoding, local
from gold_trainer.writers.fixed_cache import Batch

# What writes needs no teacher: a small one with the vocabulary.
SMALL_TEACHER = Shape(1024, 1024, 3, 8, 24, 1024, 1024, True)
LEARNT = 64, 2**26  # tensors of so many bytes that learning leaves in the allocator's cache
STAGES = (
    (local, "process_examples"),
    (local.LocalWriter, "_inputs"),
    (local, "prefill"),
    (Batch, "fill"),
    (local, "Sampler"),
    (decoding.Decoder, "_record"),
    (decoding.Decoder, "_leave"),
    (decoding.Decoder, "write"),
    (local.LocalWriter, "_write"),
)


def as_after_learning(trainer: Any, batch: Any) -> float:
    """Blocks in the allocator's cache, and tensors of the prompts; seconds of these."""
    if torch.cuda.is_available():
        kept = [torch.empty(LEARNT[1], dtype=torch.uint8, device="cuda") for _ in range(LEARNT[0])]
        del kept
    started = now()
    trainer.rollouts.look_ahead([batch], 0)
    return time.perf_counter() - started  # what the device still does is no part of it


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Within it every stage waits for the device before and after."""

    def around(name: str, function: Callable) -> Callable:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            started = now()
            result = function(*args, **kwargs)
            seconds[name] += now() - started
            return result

        return run

    with ExitStack() as stack:
        for owner, name in STAGES:
            wrapped = around(name, getattr(owner, name))
            stack.enter_context(replaced(owner, name, wrapped))
        yield


def seconds_of(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return now() - started


def say_host(call: Callable[[], Any]) -> None:
    with HostSamples() as samples:
        seconds = seconds_of(call)
    samples.describe(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 4, 64])
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    processor = processor_of_448_pixels()
    small = TINY_TEACHER if options.tiny else SMALL_TEACHER
    student = build_model(TINY_STUDENT if options.tiny else STUDENT_2B, processor, options.tiny)
    with tempfile.TemporaryDirectory() as folder:
        args = GOLDConfig(
            output_dir=folder,
            lmbda=1.0,
            max_length=512 + options.new_tokens,
            max_completion_length=options.new_tokens,
            bf16=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GOLDTrainer(
            model=student,
            teacher_model=build_model(small, processor, options.tiny),
            args=args,
            train_dataset=rows(processor, 9, max(options.batch_sizes)),
            processing_class=processor,
        )
        for num_rows in options.batch_sizes:
            batch = trainer.data_collator([trainer.train_dataset[i] for i in range(num_rows)])
            call = partial(trainer.rollouts.write, "student", [batch], 0)
            prepare = partial(as_after_learning, trainer, batch)
            with trainer.accelerator.autocast():
                taken = [(prepare(), seconds_of(call)) for _ in range(4)]
                say(f"{num_rows} rows: {' '.join(f'{t:.3f}' for _, t in taken)} s")
                say(f"  before: {' '.join(f'{t:.3f}' for t, _ in taken)} s")
                stages: dict[str, float] = defaultdict(float)
                prepare()
                with timed(stages):
                    whole = seconds_of(call)
                say(f"  waited for: {whole:.3f} s")
                for name, value in stages.items():
                    say(f"  {1000 * value:8.1f} ms  {name}")
                prepare()
                say_host(call)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Where the time of a training step goes: kernels, launches, waits, and the compiler's part.

    python benchmarks/profile_step.py --tokens 1037 4096 --modes regional off --profile

The models and rows of bench_train_step.py, in one process: Qwen3-VL-8B -> 2B shapes, LoRA, batch of
4. A mode is a value of compile_models; "dynamic" is regional with sizes that are not fixed. --tokens
takes lengths of answers, or several with a comma between them, one a row of the batch.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from typing import Any

import torch
from bench_train_step import BATCH_SIZE, StepTimer
from peft import LoraConfig, get_peft_model
from qwen3_vl_shapes import build_pair, processor_of_448_pixels, rows

from gold_trainer import GOLDConfig, GOLDTrainer
from gold_trainer.speed import compiling

MODES = ("off", "regional", "dynamic")
STEPS, WARM_UP = 6, 2


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Profiled(StepTimer):
    """Seconds of every step, a profile of the last one, and who waits in the one before it."""

    def __init__(self, num_steps: int, *, is_on: bool) -> None:
        super().__init__()
        self.num_steps, self.is_on, self.profile = num_steps, is_on, None
        self.caught: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        if self.is_on and torch.cuda.is_available() and state.global_step == 1:
            self.caught = warnings.catch_warnings(record=True)
            self.waits = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if self.is_on and state.global_step == self.num_steps - 1:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.start()
            self.start = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.caught is not None:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            self.caught = None
            places = Counter(f"{w.filename}:{w.lineno}" for w in self.waits if "sync" in str(w))
            for place, count in places.most_common():
                say(f"    waits {count:4d} x {place[-90:]}")
        super().on_step_end(*args, **kwargs)
        if self.profile is not None:
            self.profile.stop()
            describe(self.profile, self.seconds.pop())


def describe(profile: torch.profiler.profile, seconds: float) -> None:
    """Kernels by their total time, the part of the step in which one runs, and calls that wait."""
    kernels: dict[str, list[float]] = defaultdict(list)
    host: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        (kernels if is_kernel else host)[event.name].append(event.time_range.elapsed_us() / 1e3)
    busy = sum(map(sum, kernels.values())) / 1e3
    count = sum(map(len, kernels.values()))
    say(f"  profiled: {seconds:.3f} s, {busy:.3f} s in {count} kernels ({busy / seconds:.0%})")
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:40]:
        say(f"    {sum(times):8.2f} ms {len(times):6d} x {name[:130]}")
    waits = ("Synchronize", "cudaMemcpyAsync", "cudaMalloc", "cudaLaunchKernel", "cuLaunchKernel")
    waits += ("aten::item", "aten::nonzero", "aten::_local_scalar_dense")
    for name, times in host.items():
        if any(part in name for part in waits):
            say(f"    host {sum(times):8.2f} ms {len(times):6d} x {name}")


def measure(
    pair: tuple[Any, Any], processor: Any, lengths: list[int], mode: str, options: Any
) -> None:
    student, teacher = pair
    fields = {
        "per_device_train_batch_size": BATCH_SIZE,
        "max_steps": options.steps + options.profile,
        "lmbda": 0.0,
        "max_length": 512 + max(lengths),
        "train_sampling_strategy": "sequential",
        "use_uld_loss": options.loss == "uld",
        "gradient_checkpointing": options.checkpointing == "on",
        "bf16": torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "compile_models": "off" if mode == "off" else "regional",
        "optim": "sgd",  # every mode begins with nearly the same weights
        "learning_rate": 1e-9,
    }
    compiling.DYNAMIC = True if mode == "dynamic" else None
    batch = [row for length in lengths for row in rows(processor, length, 1)]
    data = (batch * BATCH_SIZE)[:BATCH_SIZE] * fields["max_steps"]
    both = {"teacher_processing_class": processor} if options.loss == "uld" else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = GOLDTrainer(
            model=student,
            teacher_model=teacher,
            args=GOLDConfig(output_dir=folder, **fields),
            train_dataset=data,
            processing_class=processor,
            **both,
        )
        prepare, prepared = trainer._prepare_inputs, []

        def timed(inputs: Any) -> Any:
            started = time.perf_counter()
            result = prepare(inputs)
            prepared.append(time.perf_counter() - started)
            return result

        trainer._prepare_inputs = timed
        timer = Profiled(fields["max_steps"], is_on=options.profile)
        trainer.add_callback(timer)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
    first = next(log for log in trainer.state.log_history if "grad_norm" in log)
    median = statistics.median(timer.seconds[WARM_UP : options.steps])
    per_row = ",".join(map(str, lengths))
    say(
        f"ROW {mode} {options.loss} tokens {per_row}: {median:.3f} s a step (all "
        f"{[round(s, 3) for s in timer.seconds]}), peak {peak:.2f} GiB, loss {first['loss']:.6f}, "
        f"norm {first['grad_norm']:.6f}, prepared in {1e3 * statistics.median(prepared):.0f} ms, compiled in {trainer.fast.compiled.all_seconds:.1f} s, "
        f"{time.perf_counter() - started:.1f} s in all"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", default=["1037"])
    parser.add_argument("--modes", nargs="+", default=["regional", "off"], choices=MODES)
    parser.add_argument("--loss", default="jsd", choices=("jsd", "uld"))
    parser.add_argument("--checkpointing", default="on", choices=("on", "off"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    processor = processor_of_448_pixels()
    student, teacher = build_pair(processor, options.tiny)
    lora = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"])
    pair = get_peft_model(student, lora), teacher
    for tokens in options.tokens:
        for mode in options.modes:
            torch._dynamo.reset()
            lengths = [int(length) for length in tokens.split(",")]
            measure(pair, processor, lengths, mode, options)


if __name__ == "__main__":
    main()

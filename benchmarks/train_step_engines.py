"""Training steps of Qwen3-VL-8B -> 2B shapes under each engine and with each kind of teacher.

    python benchmarks/bench_train_step.py --engine single ddp fsdp2 --teacher resident nf4

One launch (`accelerate launch` with a file of trainer/configs, one process a GPU) measures all
lengths of an engine, a teacher and a kind of training: rows come in the order of their lengths, and
the peak is reset where a length begins. LoRA trains r=16 on q, k, v of bf16 weights; full trains
float32 weights under bf16 autocast, without the vision tower. A row has the median seconds of the
timed steps, scored tokens of all GPUs a second, and the largest peak of a GPU, warm-up included. It
is written as soon as it is measured; what is out of memory costs the longer lengths of its launch
only. The first loss of a row must agree with that of the first row of a teacher in the same
precision; the loss of one process is compared with the oracle, as in bench_train_step.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_train_step import TIMED_STEPS, WARM_UP_STEPS, loss_error
from peft import LoraConfig
from qwen3_vl_shapes import LORA, QUIET, build_student, build_teacher, processor_of_448_pixels, rows
from record import RowLog, environment, package_versions, say
from teacher_kinds import SAVED, config_fields, max_length, prepare_teacher
from timing import now
from torch.utils.data import Sampler, SequentialSampler
from transformers import AutoProcessor, TrainerCallback

from gold_trainer import GOLDConfig, GOLDTrainer, configs

LENGTHS = (1037, 2059, 4096, 8191)
STEPS = WARM_UP_STEPS + TIMED_STEPS
ROW = "ROW "  # before what a worker has to say
MAX_LOSS_ERRORS = {"lora": 1e-4, "full": 1e-2}  # float32 weights are rounded by autocast
MAX_LOSS_DIFFERENCE = 1e-2
UNSHARDED = ("single", "ddp")  # accelerate offers the others to GPUs only
QUANTISED = ("int8", "nf4")
VERSIONS = ("accelerate", "deepspeed", "bitsandbytes")
FIELDS = (
    *("engine", "num_gpus", "teacher", "training", "checkpointing", "options", "completion_tokens"),
    *("batch_size", "memory_limit_gib", "status", "seconds_median", "tokens_per_second"),
    *("peak_gib", "reserved_gib", "resident_gib", "loss_error", "first_loss", "grad_norm"),
    *("device", "torch", "triton", "transformers", *VERSIONS, "git_sha"),
)


def say_row(row: dict[str, Any]) -> None:
    """Tell a row to the process that started this worker, on a line of its own."""
    say(f"\n{ROW}{json.dumps(row)}")


class Launch(NamedTuple):
    """What one launch measures, at several lengths."""

    engine: str
    teacher: str
    training: str  # lora or full
    checkpointing: str  # on or off


class Lengths(TrainerCallback):
    """Steps in parts, one a length; a part's row is printed when it ends."""

    def __init__(self, launch: Launch, options: argparse.Namespace, trainer: GOLDTrainer) -> None:
        self.options, self.trainer = options, trainer
        self.row = {**launch._asdict(), "options": " ".join(options.set)}
        self.row |= {"num_gpus": trainer.args.world_size, "batch_size": options.batch_size}
        self.seconds: list[float] = []

    @property
    def length(self) -> int:
        return self.options.completion_tokens[self.trainer.state.global_step // STEPS]

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not self.seconds and torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.resident = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        self.row["completion_tokens"] = self.length
        self.start = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.start)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Runs after the step's end, with its loss and gradient norm."""
        if len(self.seconds) == 1:
            self.first = logs
        if len(self.seconds) == STEPS:
            self._print(self._measured())
            self.seconds = []

    def _measured(self) -> dict[str, Any]:
        has_cuda = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if has_cuda else 0
        reserved = torch.cuda.max_memory_reserved() if has_cuda else 0
        sizes = torch.tensor([peak, reserved, self.resident], device=self.trainer.args.device)
        gathered = self.trainer.accelerator.gather(sizes).reshape(-1, 3)
        peak, reserved, resident = (gathered.amax(0) / 2**30).tolist()
        median = statistics.median(self.seconds[WARM_UP_STEPS:])
        tokens = self.row["completion_tokens"] * self.row["batch_size"] * self.row["num_gpus"]
        return {
            "status": "ok",
            "seconds_median": round(median, 3),
            "tokens_per_second": round(tokens / median),
            "peak_gib": round(peak, 2),
            "reserved_gib": round(reserved, 2),
            "resident_gib": round(resident, 2),
            "first_loss": f"{self.first['loss']:.5f}",
            "grad_norm": f"{self.first['grad_norm']:.3e}",
        }

    def _print(self, numbers: dict[str, Any]) -> None:
        if self.trainer.is_world_process_zero():
            say_row(self.row | numbers)

    def stopped(self, status: str) -> None:
        """Tell a row of any rank: the others do not come to say anything."""
        say_row(self.row | {"completion_tokens": self.length, "status": status})


class InOrder(GOLDTrainer):
    """Rows come as they stand, so that a part of the steps has one length."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return SequentialSampler(self.train_dataset)


def trainer_of(launch: Launch, options: argparse.Namespace, folder: Path) -> GOLDTrainer:
    has_cuda, is_full = torch.cuda.is_available(), launch.training == "full"
    is_saved = launch.teacher in SAVED
    processor = AutoProcessor.from_pretrained(folder) if is_saved else processor_of_448_pixels()
    student = build_student(processor, options.tiny, torch.float32 if is_full else None)
    fields = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": options.batch_size,
        "max_steps": STEPS * len(options.completion_tokens),
        "lmbda": 0.0,
        "max_length": max_length(options),
        "share_prompts": False,  # usual rows have prompts of their own
        "gradient_checkpointing": launch.checkpointing == "on",
        "bf16": has_cuda,
        "use_cpu": not has_cuda and launch.engine in UNSHARDED,
        **QUIET,
    }
    fields |= config_fields(launch.teacher, folder) | dict(map(_field, options.set))
    num_rows = STEPS * options.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    parts = [rows(processor, length, num_rows) for length in options.completion_tokens]
    lora = LoraConfig(**LORA)
    return InOrder(
        model=student,
        teacher_model=str(folder) if is_saved else build_teacher(processor, options.tiny),
        args=GOLDConfig(**fields),
        train_dataset=[row for part in parts for row in part],
        processing_class=processor,
        peft_config=None if is_full else lora,
    )


def _field(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def work(launch: Launch, options: argparse.Namespace, folder: Path) -> int:
    """One rank of a launch."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if options.memory_gib:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1, options.memory_gib * 2**30 / total))
    elif launch.engine not in UNSHARDED:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from support.engines import leave_shared_memory_alone, take_processes_for_gpus

        take_processes_for_gpus()
        if launch.engine.startswith("zero"):
            leave_shared_memory_alone()
    first = launch._asdict() | {"completion_tokens": options.completion_tokens[0]}
    lengths = None
    try:
        trainer = trainer_of(launch, options, folder)
        lengths = Lengths(launch, options, trainer)
        if launch.engine == "single" and launch.teacher == "resident":
            error, limit = loss_error(trainer), MAX_LOSS_ERRORS[launch.training]
            lengths.row["loss_error"] = f"{error:.1e}"
            if not error <= limit:  # a NaN too
                lengths.stopped(f"refused: loss error {error:.1e} exceeds {limit}")
                return 1
        trainer.add_callback(lengths)
        trainer.train()
    except torch.OutOfMemoryError:
        if lengths is None:
            say_row(first | {"status": "out of memory"})
        else:
            lengths.stopped("out of memory")
        os._exit(1)  # a rank that waits for another would wait in its group's end too
    return 0


def command_of(launch: Launch, options: argparse.Namespace, folder: Path) -> list[str]:
    command = [sys.executable]
    if launch.engine != "single":
        config = configs.FOLDER / f"{launch.engine}.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--num_processes", str(options.num_gpus), "--main_process_port", "0"]
    command += [__file__, "--worker", json.dumps(launch), "--folder", str(folder)]
    command += ["--options", json.dumps(vars(options) | {"output": None, "log": None})]
    return command


def run(
    launch: Launch, options: argparse.Namespace, folder: Path, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row a length, each as soon as it is known."""
    left, said = deque(options.completion_tokens), []
    status, is_over = f"not run: {options.seconds:g} s were over", seconds <= 0
    if not is_over:
        process, status = Process(command_of(launch, options, folder), seconds), ""
        for line in process.lines():
            row = json.loads(line.removeprefix(ROW)) if line.startswith(ROW) else None
            if row is None:
                said.append(line)
            elif left and row["completion_tokens"] == left[0]:  # other ranks may say it too
                left.popleft()
                yield row
                status = "" if row["status"] == "ok" else f"not run: {row['status']} before"
        if process.is_over:
            status = f"stopped: {options.seconds:g} s were over"
        status = status or f"failed with {process.wait()}: {_error_in(said)}"
    if options.log:
        with options.log.open("a", encoding="utf-8") as file:
            file.write(f"{launch}\n{''.join(said)}\n")
    for length in left:
        yield {**launch._asdict(), "completion_tokens": length, "status": status}


class Process(subprocess.Popen):
    """What it starts ends with it, at the latest when its time is over."""

    def __init__(self, command: list[str], seconds: float) -> None:
        super().__init__(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.is_over = False
        self.timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._stop)
        self.timer.start()

    def _stop(self) -> None:
        self.is_over = True
        os.killpg(self.pid, signal.SIGKILL)

    def lines(self) -> Iterator[str]:
        assert self.stdout is not None, "it is a pipe"
        try:
            yield from self.stdout
            self.wait()
        finally:
            self.timer.cancel()
            if self.poll() is None:
                self._stop()


def _error_in(lines: list[str]) -> str:
    """What a rank ended with: the first line that reads like it."""
    errors = (re.search(r"\b\w*(Error|Exception): .*", line) for line in lines)
    return next((error.group()[:200] for error in errors if error), "")


def checked(row: dict[str, Any], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """The row, without numbers where its loss is not that of the first row of its length."""
    if row["status"] != "ok" or row["teacher"] in QUANTISED:
        return row
    names = ("training", "completion_tokens", "batch_size")
    for other in earlier:
        is_same = all(other.get(name) == row[name] for name in names)
        if is_same and other["status"] == "ok" and other["teacher"] not in QUANTISED:
            ours, theirs = float(row["first_loss"]), float(other["first_loss"])
            if not abs(ours - theirs) <= MAX_LOSS_DIFFERENCE * theirs:  # a NaN too
                named = {name: row[name] for name in Launch._fields}
                status = f"refused: first loss {ours}, that of {other['engine']} is {theirs}"
                return named | {"completion_tokens": row["completion_tokens"], "status": status}
            break
    return row


def num_gpus_of(launch: Launch, options: argparse.Namespace) -> int:
    return 1 if launch.engine == "single" else options.num_gpus


def launches_of(options: argparse.Namespace) -> list[Launch]:
    return [
        Launch(engine, teacher, training, checkpointing)
        for training in options.training
        for checkpointing in options.checkpointing
        for teacher in options.teacher
        for engine in options.engine
        if not (engine == "single" and teacher == "fsdp")
    ]


def main(options: argparse.Namespace) -> int:
    options.completion_tokens = sorted(options.completion_tokens or LENGTHS)
    options.num_gpus = options.num_gpus or torch.cuda.device_count() or 2
    log, started = RowLog(options.output, FIELDS, appends=True), time.monotonic()
    where = environment() | package_versions(VERSIONS)
    where |= {"memory_limit_gib": options.memory_gib or ""}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        launches = launches_of(options)
        num_processes = max(num_gpus_of(launch, options) for launch in launches)
        num_rows = STEPS * options.batch_size * num_processes
        prepare_teacher({launch.teacher for launch in launches}, folder, options, num_rows)
        for launch in launches:
            seconds = options.seconds - (time.monotonic() - started)
            for row in run(launch, options, folder, seconds):
                row = {"batch_size": options.batch_size, "options": " ".join(options.set)} | row
                row.setdefault("num_gpus", num_gpus_of(launch, options))
                log.add(where | checked(row, log.rows))
                say(f"{time.monotonic() - started:.0f} s: {row}")
    return int(any(row["status"].startswith(("failed", "refused")) for row in log.rows))


def worker(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", type=json.loads)
    parser.add_argument("--options", type=json.loads)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args(arguments)
    options = argparse.Namespace(**given.options)
    return work(Launch(*given.worker), options, given.folder)


if __name__ == "__main__":
    sys.exit(worker())

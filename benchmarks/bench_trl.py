"""trl's trainers with patch_trl() and without, on one GPU, beside our own trainer.

    python benchmarks/bench_trl.py --seconds 95

Qwen3-VL-8B -> 2B shapes and the step of bench_train_step.py: LoRA, gradient checkpointing, batch 4,
one picture a sample. All cases run in one process, each on models of its own. "stable" is trl's
DistillationTrainer at beta 0.5, whose generation is replaced by fixed ids; "gold" is GOLDTrainer
off-policy, with its defaults. The median of the timed steps is reported; a slow case has fewer of
them. The peak is torch.cuda.max_memory_allocated. A patched case must have the first loss of the
other within MAX_DIFFERENCE, or its row has a status in place of numbers. `--tiny` runs the same
code anywhere.
"""

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bench_train_step
import torch
from bench_train_step import BATCH_SIZE, StepTimer
from datasets import Dataset
from peft import LoraConfig
from qwen3_vl_shapes import LORA, QUIET, build_pair, processor_of_448_pixels, rows
from record import RESULTS, RowLog, environment, package_versions, say
from timing import release

from gold_kernels.integrations.trl import patch_trl

MAX_DIFFERENCE = {"jsd": 2e-2, "uld": 5e-2}  # trl's GOLD computes in bf16
FIELDS = (
    *("trainer", "loss", "patched", "completion_tokens", "batch_size", "status", "steps"),
    *("seconds_median", "peak_gib", "resident_gib", "first_loss", "grad_norm"),
    *("device", "torch", "triton", "transformers", "trl", "git_sha"),
)


class Case(NamedTuple):
    trainer: str  # "gold", "stable", or "own", which is ours
    loss: str
    is_patched: bool
    warm_up: int = 2
    timed: int = 4


CASES = (
    Case("gold", "uld", False, 1, 2),
    Case("gold", "uld", True),
    Case("stable", "jsd", False),
    Case("stable", "jsd", True),
    Case("own", "jsd", False),
    Case("own", "uld", False),
    Case("gold", "jsd", False),
    Case("gold", "jsd", True),
)


def build(case: Case, num_tokens: int, folder: str, is_tiny: bool) -> Any:
    if case.trainer != "stable":
        name = "gold_kernels" if case.trainer == "own" else "trl"
        shape = bench_train_step.Case(name, case.loss, num_tokens)
        return bench_train_step.build_trainer(shape, folder, is_tiny)
    from trl import DistillationConfig, DistillationTrainer

    processor = processor_of_448_pixels()
    student, teacher = build_pair(processor, is_tiny)
    data = rows(processor, num_tokens, BATCH_SIZE * (case.warm_up + case.timed))
    answer = data[0]["completion"][0]["content"]
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        processing_class=processor,
        peft_config=LoraConfig(**LORA),
        train_dataset=Dataset.from_list(
            [{name: row[name] for name in ("prompt", "images")} for row in data]
        ),
        args=DistillationConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH_SIZE,
            max_completion_length=num_tokens,
            beta=0.5,
            gradient_checkpointing=True,
            bf16=torch.cuda.is_available(),
            **QUIET,
        ),
    )
    tokenizer = processor.tokenizer
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert len(ids) == num_tokens, "the end of the turn is the last"

    def generate(input_ids: torch.Tensor, **_options: Any) -> torch.Tensor:
        completion = torch.tensor(ids, device=input_ids.device)
        return torch.cat([input_ids, completion.expand(len(input_ids), -1)], dim=1)

    trainer.model.generate = generate
    return trainer


def measure(case: Case, num_tokens: int, is_tiny: bool) -> dict[str, Any]:
    has_cuda = torch.cuda.is_available()
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(case, num_tokens, folder, is_tiny)
        trainer.args.max_steps = case.warm_up + case.timed
        trainer.add_callback(timer)
        release()
        resident = torch.cuda.memory_allocated() if has_cuda else 0
        try:
            trainer.train()
        except torch.OutOfMemoryError:
            return {"status": "out of memory"}
        peak = torch.cuda.max_memory_allocated() if has_cuda else 0
    steps = [log for log in trainer.state.log_history if "grad_norm" in log]
    return {
        "status": "ok" if all(math.isfinite(log["grad_norm"]) for log in steps) else "not finite",
        "steps": case.timed,
        "seconds_median": round(statistics.median(timer.seconds[case.warm_up :]), 3),
        "peak_gib": round(peak / 2**30, 2),
        "resident_gib": round(resident / 2**30, 2),
        "first_loss": f"{steps[0]['loss']:.5f}",
        "grad_norm": f"{steps[0]['grad_norm']:.3e}",
    }


def checked(row: dict[str, Any], before: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A patched row without numbers where its first loss is another than trl's."""
    for other in before:
        is_pair = all(other[name] == row[name] for name in ("trainer", "loss"))
        if is_pair and row["patched"] and other["status"] == row["status"] == "ok":
            first, expected = float(row["first_loss"]), float(other["first_loss"])
            if not abs(first - expected) <= MAX_DIFFERENCE[row["loss"]] * expected:
                kept = {name: row[name] for name in row if name not in FIELDS[6:12]}
                return {**kept, "status": f"refused: first loss {first} where trl has {expected}"}
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completion-tokens", type=int, default=1037)
    parser.add_argument("--seconds", type=float, default=math.inf, help="no case begins later")
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, help="default: the record, none with --tiny")
    options = parser.parse_args(arguments)
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("bench_trl: a CUDA GPU is expected, got none; --tiny runs anywhere")
    if options.output is None and not options.tiny:
        options.output = RESULTS / "trl.csv"
    log, started = RowLog(options.output, FIELDS), time.monotonic()
    for case in (CASES[number] for number in options.cases):
        row = {
            "trainer": case.trainer,
            "loss": case.loss,
            "patched": "yes" if case.is_patched else "no",
            "completion_tokens": options.completion_tokens,
            "batch_size": BATCH_SIZE,
            **environment(),
            **package_versions(["trl"]),
        }
        if time.monotonic() - started > options.seconds:
            row["status"] = f"not run: {options.seconds:g} s were over"
        elif case.is_patched:
            with patch_trl():
                row |= measure(case, options.completion_tokens, options.tiny)
        else:
            row |= measure(case, options.completion_tokens, options.tiny)
        log.add(checked(row, log.rows))
        say(f"{time.monotonic() - started:.0f} s: {log.rows[-1]}")
    return int(any(row["status"] != "ok" for row in log.rows))


if __name__ == "__main__":
    sys.exit(main())

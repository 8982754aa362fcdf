"""One training step of Qwen3-VL-8B -> Qwen3-VL-2B shapes: seconds and peak memory on one GPU.

    python benchmarks/bench_train_step.py --completion-tokens 518 1037 2060 --memory-gib 79.1

Stock Qwen3-VL classes with random bf16 weights, LoRA r=16 on q, k, v, gradient checkpointing, batch
4, one 448 x 448 picture a sample, off-policy; ours and TRL's GOLDTrainer on the same models and
rows, each in a process of its own, within --memory-gib of the GPU. The median of steps 3 to 6 is
reported; the peak is torch.cuda.max_memory_allocated. Our loss of a batch is first compared with
that of full logits in float64 softmax; a failed comparison, or a gradient that is not finite,
prints no number. `--tiny` runs the same code on models of a few hundred thousand parameters
anywhere, without a record.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from qwen3_vl_shapes import build_pair, processor_of_448_pixels, rows
from record import RESULTS, environment, write_rows
from transformers import TrainerCallback

from gold_kernels import reference
from trainer import GOLDConfig, GOLDTrainer

WARM_UP_STEPS, TIMED_STEPS = 2, 4
BATCH_SIZE = 4
MAX_LOSS_ERROR = 1e-4  # the same bf16 hidden states on both sides: only the loss differs
IMPLEMENTATIONS = ("gold_kernels", "trl")


class StepTimer(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self.start)


def build_trainer(name: str, completion_tokens: int, folder: str, is_tiny: bool) -> Any:
    """The trainer of this implementation on the same models, rows and options."""
    processor = processor_of_448_pixels()
    student, teacher = build_pair(processor, is_tiny)
    options = {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH_SIZE,
        "max_steps": WARM_UP_STEPS + TIMED_STEPS,
        "lmbda": 0.0,
        "max_length": 512 + completion_tokens,
        "gradient_checkpointing": True,
        "bf16": torch.cuda.is_available(),  # what both trainers' users run
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    data = rows(processor, completion_tokens, BATCH_SIZE * (WARM_UP_STEPS + TIMED_STEPS))
    common = {
        "model": student,
        "teacher_model": teacher,
        "processing_class": processor,
        "peft_config": LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"]),
    }
    if name == "gold_kernels":
        return GOLDTrainer(args=GOLDConfig(**options), train_dataset=data, **common)
    from trl.experimental.gold import GOLDConfig as PeerConfig
    from trl.experimental.gold import GOLDTrainer as PeerTrainer

    return PeerTrainer(args=PeerConfig(**options), train_dataset=Dataset.from_list(data), **common)


@torch.no_grad()
def loss_error(trainer: GOLDTrainer) -> float:
    """Relative error of one sample's loss against full logits with softmax in float64."""
    batch = trainer.data_collator([trainer.train_dataset[0]])
    inputs = trainer._prepare_inputs(batch)
    model = trainer.model.eval()
    fused = trainer.compute_loss(model, inputs)
    positions = inputs["scored_rows"]

    def logits(side: Any, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        hidden = side(**tensors, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        return hidden.flatten(0, 1)[positions].double() @ weight.double().T

    student = logits(model, inputs["student"], trainer.student_head.weight)
    teacher = logits(trainer.teacher_model, inputs["teacher"], trainer.teacher_head.weight)
    oracle = torch.cat(
        [
            reference.jsd_rows(s, t)
            for s, t in zip(student.split(64), teacher.split(64), strict=True)
        ]
    ).mean()
    model.train()
    return abs(float(fused) - float(oracle)) / float(oracle)


def measure(name: str, completion_tokens: int, memory_gib: float, is_tiny: bool) -> dict[str, Any]:
    """One case; what is printed of a case that ran out of memory is the limit."""
    has_cuda = torch.cuda.is_available()
    if has_cuda and memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gib * 2**30 / total))
    case = {"implementation": name, "loss": "jsd", "completion_tokens": completion_tokens}
    case |= {"batch_size": BATCH_SIZE, "memory_limit_gib": memory_gib or ""}
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(name, completion_tokens, folder, is_tiny)
        timer = StepTimer()
        trainer.add_callback(timer)
        error = loss_error(trainer) if name == "gold_kernels" else math.nan
        if error > MAX_LOSS_ERROR:
            sys.exit(f"{name}: loss error {error:.1e} exceeds {MAX_LOSS_ERROR}; no numbers")
        resident = torch.cuda.memory_allocated() if has_cuda else 0
        if has_cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            trainer.train()
        except torch.OutOfMemoryError:
            return {**case, "seconds_median": "out of memory", **environment()}
        peak = torch.cuda.max_memory_allocated() if has_cuda else 0
    steps = [log for log in trainer.state.log_history if "grad_norm" in log]
    if name == "gold_kernels" and not all(math.isfinite(log["grad_norm"]) for log in steps):
        sys.exit(f"{name}: gradient norm {steps[0]['grad_norm']}; no numbers")
    return {
        **case,
        "seconds_median": round(statistics.median(timer.seconds[WARM_UP_STEPS:]), 3),
        "peak_gib": round(peak / 2**30, 2),
        "resident_gib": round(resident / 2**30, 2),
        "loss_error": f"{error:.1e}",
        "first_loss": f"{steps[0]['loss']:.5f}",
        "grad_norm": f"{steps[0]['grad_norm']:.3e}",
        **environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completion-tokens", type=int, nargs="+", default=[518, 1037, 2060])
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--memory-gib", type=float, default=0.0, help="0: all there is")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "train_step.csv")
    parser.add_argument("--one-case", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("bench_train_step: a CUDA GPU is expected, got none; --tiny runs anywhere")
    cases = [(name, n) for n in options.completion_tokens for name in options.implementations]
    if options.one_case:
        row = measure(*cases[0], options.memory_gib, options.tiny)
        sys.stdout.write("\n" + json.dumps(row) + "\n")
        return
    results = []
    for name, completion_tokens in cases:
        command = [sys.executable, __file__, "--one-case", "--implementations", name]
        command += ["--completion-tokens", str(completion_tokens)]
        command += ["--memory-gib", str(options.memory_gib)] + ["--tiny"] * options.tiny
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"{name}, {completion_tokens} tokens: failed, see above; nothing written")
        results.append(json.loads(done.stdout.splitlines()[-1]))
        sys.stdout.write(f"{results[-1]}\n")
        sys.stdout.flush()
    if not options.tiny:
        write_rows(options.output, results)


if __name__ == "__main__":
    main()

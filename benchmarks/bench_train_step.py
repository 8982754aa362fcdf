"""One training step of Qwen3-VL-8B -> Qwen3-VL-2B shapes: seconds and peak memory on one GPU.

    python benchmarks/bench_train_step.py --memory-gib 79.1 --seconds 530

Stock Qwen3-VL classes with random bf16 weights, LoRA r=16 on q, k, v, gradient checkpointing, batch
4, one 448 x 448 picture a sample, off-policy; ours and TRL's GOLDTrainer on the same models and
rows, each in a process of its own, within --memory-gib of the GPU. uld is use_uld_loss=True with
each trainer's defaults, one tokenizer on both sides and V = 151936 twice. The median of steps 3 to
6 is reported; the peak is torch.cuda.max_memory_allocated. Our loss of a sample is first compared
with that of full logits in float64 softmax; a failed comparison, or a gradient that is not finite,
gives a row without numbers, whose status says why. So does a case that is out of memory, or that
--seconds leave no time for; ours come first. Each row is written as soon as it is measured.
`--tiny` runs the same code on models of a few hundred thousand parameters anywhere, with a record
only where --output says. --engine and --teacher measure ours alone, on one GPU or several:
train_step_engines.py says how.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from qwen3_vl_shapes import LORA, QUIET, build_pair, processor_of_448_pixels, rows
from record import RESULTS, RowLog, environment, say
from timing import now, release
from transformers import TrainerCallback

from gold_kernels.jsd import reference
from gold_kernels.uld import reference as reference_uld
from gold_trainer import GOLDConfig, GOLDTrainer

WARM_UP_STEPS, TIMED_STEPS = 2, 4
BATCH_SIZE = 4
# The same bf16 hidden states on both sides: only the loss differs.
MAX_LOSS_ERRORS = {"jsd": 1e-4, "uld": 5e-4}
IMPLEMENTATIONS = ("gold_kernels", "trl")
ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3")
TEACHERS = ("resident", "int8", "nf4", "offload", "cache", "fsdp")
# TRL's JSD is out of memory at 2060 tokens in 80 GB, its ULD then takes 15 s and 66 GiB.
COMPLETION_TOKENS = {"gold_kernels": (518, 1037, 2060, 8192), "trl": (518, 1037, 2060)}
FIELDS = (
    *("implementation", "loss", "completion_tokens", "batch_size", "memory_limit_gib", "status"),
    *("seconds_median", "peak_gib", "resident_gib", "loss_error", "first_loss", "grad_norm"),
    *("device", "torch", "triton", "transformers", "git_sha"),
)


class Case(NamedTuple):
    implementation: str
    loss: str  # jsd or uld
    completion_tokens: int


class StepTimer(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self.start)


def build_trainer(case: Case, folder: str, is_tiny: bool) -> Any:
    """The trainer of this implementation on the same models, rows and options."""
    completion_tokens = case.completion_tokens
    processor = processor_of_448_pixels()
    student, teacher = build_pair(processor, is_tiny)
    options = {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH_SIZE,
        "max_steps": WARM_UP_STEPS + TIMED_STEPS,
        "lmbda": 0.0,
        "max_length": 512 + completion_tokens,
        "use_uld_loss": case.loss == "uld",
        "gradient_checkpointing": True,
        "bf16": torch.cuda.is_available(),  # what both trainers' users run
        **QUIET,
    }
    data = rows(processor, completion_tokens, BATCH_SIZE * (WARM_UP_STEPS + TIMED_STEPS))
    common = {
        "model": student,
        "teacher_model": teacher,
        "processing_class": processor,
        "peft_config": LoraConfig(**LORA),
    }
    if case.implementation == "gold_kernels":
        if case.loss == "uld":
            common["teacher_processing_class"] = processor
        args = GOLDConfig(**options, share_prompts=False)  # usual rows have prompts of their own
        return GOLDTrainer(args=args, train_dataset=data, **common)
    if case.loss == "uld":  # TRL loads the teacher's processor from where the teacher was
        processor.save_pretrained(f"{folder}/teacher")
        teacher.config.save_pretrained(f"{folder}/teacher")
        teacher.config._name_or_path = f"{folder}/teacher"
    from trl.experimental.gold import GOLDConfig as PeerConfig
    from trl.experimental.gold import GOLDTrainer as PeerTrainer

    return PeerTrainer(args=PeerConfig(**options), train_dataset=Dataset.from_list(data), **common)


def hybrid_options(objective: Any, device: torch.device) -> dict[str, Any]:
    """Options of the oracle, where the loss is hybrid ULD."""
    if objective.overlap is None:
        return {}
    names = ("beta", "matched_weight", "unmatched_weight")
    overlap = objective.overlap.to(device)
    return {"overlap": overlap, **{name: objective.options[name] for name in names}}


@torch.no_grad()
def loss_error(trainer: GOLDTrainer, num_rows: int = 1) -> float:
    """Relative error of the loss of a few samples against full logits with softmax in float64.
    Samples are packed where a step packs them; the oracle pads.
    """
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(num_rows)])
    inputs = trainer._prepare_inputs(batch)
    model = trainer.model.eval()
    with trainer.fast.packing.running():
        fused = trainer.compute_loss(model, inputs)
    positions = inputs.student.scored_rows

    def logits(side: Any, tensors: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
        hidden = side(**tensors, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        return hidden.flatten(0, 1)[positions].double() @ weight.double().T

    student = logits(model, inputs.student.tensors, trainer.student.head.weight)
    teacher = logits(
        trainer.teacher_model, inputs.teacher.tensors, trainer.teacher.side.head.weight
    )
    parts = zip(student.split(64), teacher.split(64), strict=True)
    if not trainer.args.use_uld_loss:
        oracle = sum(reference.jsd_rows(s, t).sum() for s, t in parts)
    else:  # one tokenizer: groups are pairs of tokens
        options = hybrid_options(trainer.objective, trainer.args.device)
        oracle = sum(
            reference_uld.uld_loss(s, t, s.new_ones(s.shape[0]), **options) for s, t in parts
        )
    oracle = oracle / len(positions)
    model.train()
    return abs(float(fused) - float(oracle)) / float(oracle)


def measure(case: Case, memory_gib: float, is_tiny: bool) -> dict[str, Any]:
    """A row; of a case that ran out of memory, at whatever point, it says so and has the limit."""
    if torch.cuda.is_available() and memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gib * 2**30 / total))
    row = {**case._asdict(), "batch_size": BATCH_SIZE, "memory_limit_gib": memory_gib or ""}
    row |= environment()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return row | train(build_trainer(case, folder, is_tiny), case)
    except torch.OutOfMemoryError:
        return row | {"status": "out of memory"}


def train(trainer: Any, case: Case) -> dict[str, Any]:
    """Status and numbers of the steps; ours are checked first."""
    has_cuda = torch.cuda.is_available()
    is_ours = case.implementation == "gold_kernels"
    timer = StepTimer()
    trainer.add_callback(timer)
    error = loss_error(trainer) if is_ours else math.nan
    limit = MAX_LOSS_ERRORS[case.loss]
    if is_ours and not error <= limit:  # a NaN too
        return {"status": f"refused: loss error {error:.1e} exceeds {limit}"}
    release()
    resident = torch.cuda.memory_allocated() if has_cuda else 0
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if has_cuda else 0
    steps = [log for log in trainer.state.log_history if "grad_norm" in log]
    norms = [log["grad_norm"] for log in steps]
    if is_ours and not all(map(math.isfinite, norms)):
        return {"status": f"refused: gradient norms {norms}"}
    return {
        "status": "ok",
        "seconds_median": round(statistics.median(timer.seconds[WARM_UP_STEPS:]), 3),
        "peak_gib": round(peak / 2**30, 2),
        "resident_gib": round(resident / 2**30, 2),
        "loss_error": f"{error:.1e}",
        "first_loss": f"{steps[0]['loss']:.5f}",
        "grad_norm": f"{norms[0]:.3e}",
    }


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--completion-tokens", type=int, nargs="+", help="default 518 to 8192")
    parser.add_argument(
        "--implementations", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS
    )
    parser.add_argument("--loss", nargs="+", default=["jsd", "uld"], choices=MAX_LOSS_ERRORS)
    parser.add_argument("--memory-gib", type=float, default=0.0, help="0: all there is")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of all cases together")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, help="default: the record, none with --tiny")
    parser.add_argument("--one-case", action="store_true", help=argparse.SUPPRESS)
    add_engine_options(parser)
    options = parser.parse_args(arguments)
    if not (options.tiny or torch.cuda.is_available()):
        sys.exit("bench_train_step: a CUDA GPU is expected, got none; --tiny runs anywhere")
    if options.output is None and not options.tiny:
        options.output = RESULTS / f"train_step{'_engines' * measures_engines(options)}.csv"
    return options


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of train_step_engines.py."""
    group = parser.add_argument_group("engines and teachers, instead of implementations")
    group.add_argument("--engine", nargs="+", choices=ENGINES)
    group.add_argument("--teacher", nargs="+", choices=TEACHERS)
    group.add_argument("--training", nargs="+", default=["lora"], choices=("lora", "full"))
    group.add_argument("--checkpointing", nargs="+", default=["on"], choices=("on", "off"))
    group.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="of a GPU")
    group.add_argument("--log", type=Path, help="what the processes say")
    group.add_argument("--num-gpus", type=int, default=0, help="0: all there are")
    group.add_argument("--set", nargs="+", default=[], help="fields of GOLDConfig, name=value")


def measures_engines(options: argparse.Namespace) -> bool:
    return options.engine is not None or options.teacher is not None


def run_in_own_process(
    case: Case, options: argparse.Namespace, seconds_left: float
) -> dict[str, Any]:
    """Its row; a process that failed or took too long leaves one that says so."""
    if seconds_left <= 0:
        return {**case._asdict(), "status": f"not run: {options.seconds:g} s were over"}
    command = [sys.executable, __file__, "--one-case", "--implementations", case.implementation]
    command += ["--loss", case.loss, "--completion-tokens", str(case.completion_tokens)]
    command += ["--memory-gib", str(options.memory_gib)] + ["--tiny"] * options.tiny
    timeout = None if math.isinf(seconds_left) else seconds_left
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {**case._asdict(), "status": f"stopped: {options.seconds:g} s were over"}
    if done.returncode != 0:
        return {**case._asdict(), "status": f"failed with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def cases_of(options: argparse.Namespace) -> list[Case]:
    return [
        Case(name, loss, num_tokens)
        for name in options.implementations
        for loss in options.loss
        for num_tokens in options.completion_tokens or COMPLETION_TOKENS[name]
    ]


def is_as_expected(row: dict[str, Any]) -> bool:
    """Measured, or a peer out of memory."""
    expected = ("ok",) if row["implementation"] == "gold_kernels" else ("ok", "out of memory")
    return row["status"] in expected


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    if measures_engines(options):
        import train_step_engines

        options.engine = options.engine or ["single"]
        options.teacher = options.teacher or ["resident"]
        return train_step_engines.main(options)
    cases = cases_of(options)
    if options.one_case:
        row = measure(cases[0], options.memory_gib, options.tiny)
        say("\n" + json.dumps(row))
        return 0
    log = RowLog(options.output, FIELDS)
    started = time.monotonic()
    for case in cases:
        seconds = time.monotonic() - started
        say(f"{seconds:.0f} s: {' '.join(map(str, case))}")
        log.add(run_in_own_process(case, options, options.seconds - seconds))
        say(str(log.rows[-1]))
    return int(not all(map(is_as_expected, log.rows)))


if __name__ == "__main__":
    sys.exit(main())

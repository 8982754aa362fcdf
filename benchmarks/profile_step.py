"""Training steps beside each other in one process, and where the time of a step goes.

    python benchmarks/profile_step.py --tokens 1037 4096 --modes regional off trl --profile

The models and rows of bench_train_step.py: Qwen3-VL-8B -> 2B shapes, LoRA, 4 rows with a picture.
Modes: "regional" and "off" are values of compile_models, "packed" is regional with
padding_free=True, "dynamic" is regional with sizes that are not fixed, "trl" is the learning step
of TRL's stable DistillationTrainer, whose generation is replaced by the rows' ids, or, with ULD, of
its GOLDTrainer. "before" is ours of a commit before 2026-11-30, when layers were not compiled:
PYTHONPATH has gold_trainer and gold_kernels of that commit, and this file is of a later one.
--tokens takes lengths of answers, or several with commas between them, one a row of a batch. Our
loss is first compared with full logits in float64 softmax; one that fails has no time. --profile
adds, of each of our modes, kernels by their total time, where the device waits, where the host is,
and the lines that wait for the device.
"""

import argparse
import statistics
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from bench_train_step import BATCH_SIZE, MAX_LOSS_ERRORS, StepTimer, loss_error
from datasets import Dataset
from host_samples import HostSamples
from peft import LoraConfig, get_peft_model
from qwen3_vl_shapes import LORA, QUIET, build_pair, processor_of_448_pixels, rows
from record import RowLog, environment, say
from timeline import describe, kernels_of
from timing import now, release

from gold_trainer import GOLDConfig, GOLDTrainer

MODES = ("off", "regional", "packed", "dynamic", "trl", "before")
CHECKED = ("off", "regional", "packed", "dynamic")
STEPS, WARM_UP = 6, 2
HYBRID = {"uld_hybrid_matched_weight": 0.5, "uld_hybrid_unmatched_weight": 0.5}
LOSSES: dict[str, dict[str, Any]] = {  # fields of both GOLDConfigs
    "jsd": {},
    "uld": {"use_uld_loss": True},
    "hybrid": {"use_uld_loss": True, "uld_use_hybrid_loss": True, **HYBRID},
}
FIELDS = (
    *(
        "mode",
        "loss",
        "completion_tokens",
        "batch_size",
        "micro_batches",
        "checkpointing",
        "status",
    ),
    *("seconds_median", "tokens_per_second", "peak_gib", "compile_seconds", "loss_error"),
    *("first_loss", "grad_norm", "device", "torch", "triton", "transformers", "git_sha"),
)


class Profiled(StepTimer):
    """Seconds of every step; of the second one who waits, of the last but one where the host is, of
    the last one what the device does.
    """

    def __init__(self, num_steps: int, *, is_on: bool) -> None:
        super().__init__()
        self.num_steps, self.is_on, self.profile = num_steps, is_on, None
        self.caught: Any = None
        self.samples: HostSamples | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        if self.is_on and torch.cuda.is_available() and state.global_step == 1:
            self.caught = warnings.catch_warnings(record=True)
            self.waits = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if self.is_on and state.global_step == self.num_steps - 2:
            self.samples = HostSamples()
            self.samples.start()
        if self.is_on and state.global_step == self.num_steps - 1:
            name = "CUDA" if torch.cuda.is_available() else "CPU"
            activity = getattr(torch.profiler.ProfilerActivity, name)
            self.profile = torch.profiler.profile(activities=[activity])
            self.profile.start()
            self.start = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.caught is not None:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            self.caught = None
            places = Counter(f"{w.filename}:{w.lineno}" for w in self.waits if "sync" in str(w))
            for place, count in places.most_common():
                say(f"    waits {count:4d} x {place[-90:]}")
        super().on_step_end(*args, **kwargs)
        if self.samples is not None:
            self.samples.stop()
            self.samples.describe(self.seconds[-1])
            self.samples = None
        if self.profile is not None:
            self.profile.stop()
            describe(kernels_of(self.profile), self.seconds.pop())


def fields_of(lengths: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Fields of both trainers' configs."""
    return {
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.micro_batches,
        "max_steps": options.steps + options.profile,
        "gradient_checkpointing": options.checkpointing == "on",
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        **QUIET,
        "optim": "sgd",  # every mode begins with nearly the same weights
        "learning_rate": 1e-9,
    }


def rows_of(processor: Any, lengths: list[int], fields: dict[str, Any]) -> list[dict[str, Any]]:
    batch = [row for length in lengths for row in rows(processor, length, 1)]
    size = fields["per_device_train_batch_size"] * fields["gradient_accumulation_steps"]
    return (batch * size)[:size] * fields["max_steps"]


def ours(
    pair: tuple[Any, Any], processor: Any, lengths: list[int], mode: str, options: Any, folder: str
) -> GOLDTrainer:
    fields = fields_of(lengths, options)
    speed: dict[str, Any] = {}
    if mode != "before":
        from gold_trainer.speed import compiling

        compiling.DYNAMIC = True if mode == "dynamic" else None
        compiled = "off" if mode == "off" else "regional"
        speed = {"compile_models": compiled, "padding_free": mode == "packed"}
        speed["share_prompts"] = False  # usual rows have prompts of their own
    return GOLDTrainer(
        model=pair[0],
        teacher_model=pair[1],
        args=GOLDConfig(
            output_dir=folder,
            **fields,
            lmbda=0.0,
            max_length=512 + max(lengths),
            train_sampling_strategy=options.sampling,
            **LOSSES[options.loss],
            **speed,
        ),
        train_dataset=rows_of(processor, lengths, fields),
        processing_class=processor,
        teacher_processing_class=processor if LOSSES[options.loss] else None,
    )


def stable(
    pair: tuple[Any, Any], processor: Any, lengths: list[int], options: Any, folder: str
) -> Any:
    from trl import DistillationConfig, DistillationTrainer

    fields = fields_of(lengths, options)
    data = rows_of(processor, lengths, fields)
    answers = [row["completion"][0]["content"] for row in data]
    tokenizer = processor.tokenizer
    ids = {a: tokenizer(a, add_special_tokens=False)["input_ids"] for a in set(answers)}
    trainer = DistillationTrainer(
        model=pair[0],
        teacher_model=pair[1],
        args=DistillationConfig(
            output_dir=folder,
            **fields,
            max_completion_length=max(lengths),
            beta=0.5,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list(
            [{name: row[name] for name in ("prompt", "images")} for row in data]
        ),
        processing_class=processor,
    )
    given = iter(answers)

    def known(prompt_ids: list, *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[*ids[next(given)], tokenizer.eos_token_id] for _ in prompt_ids]

    trainer._generate_single_turn = known
    return trainer


def experimental(
    pair: tuple[Any, Any], processor: Any, lengths: list[int], options: Any, folder: str
) -> Any:
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    fields = fields_of(lengths, options)
    student, teacher = pair
    processor.save_pretrained(f"{folder}/teacher")  # it is loaded from where the teacher was
    teacher.config.save_pretrained(f"{folder}/teacher")
    teacher.config._name_or_path = f"{folder}/teacher"
    return GOLDTrainer(
        model=student,
        teacher_model=teacher,
        args=GOLDConfig(
            output_dir=folder,
            **fields,
            **LOSSES[options.loss],
            lmbda=0.0,
            max_length=512 + max(lengths),
        ),
        train_dataset=Dataset.from_list(rows_of(processor, lengths, fields)),
        processing_class=processor,
    )


def measure(
    pair: tuple[Any, Any], processor: Any, lengths: list[int], mode: str, options: Any
) -> dict[str, Any]:
    has_cuda = torch.cuda.is_available()
    row = {"mode": mode, "loss": options.loss, "batch_size": options.batch_size, "status": "ok"}
    row |= {"completion_tokens": " ".join(map(str, lengths)), **environment()}
    row |= {"micro_batches": options.micro_batches, "checkpointing": options.checkpointing}
    with tempfile.TemporaryDirectory() as folder:
        if mode == "trl":
            build = experimental if LOSSES[options.loss] else stable
            trainer = build(pair, processor, lengths, options, folder)
        else:
            trainer = ours(pair, processor, lengths, mode, options, folder)
        if mode in CHECKED:
            num_rows = 2 if mode == "packed" else 1
            error, limit = (
                loss_error(trainer, num_rows),
                MAX_LOSS_ERRORS["uld" if LOSSES[options.loss] else "jsd"],
            )
            row["loss_error"] = f"{error:.1e}"
            if not error <= limit:  # a NaN too
                return row | {"status": f"refused: loss error {error:.1e} exceeds {limit}"}
        timer = Profiled(options.steps + options.profile, is_on=options.profile and mode in CHECKED)
        trainer.add_callback(timer)
        release()  # trainers of other cases
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if has_cuda else 0
    first = next(log for log in trainer.state.log_history if "grad_norm" in log)
    median = statistics.median(timer.seconds[WARM_UP : options.steps])
    batch = [lengths[i % len(lengths)] for i in range(options.batch_size * options.micro_batches)]
    say(f"  seconds of all steps: {[round(seconds, 3) for seconds in timer.seconds]}")
    if mode in CHECKED:
        row["compile_seconds"] = round(trainer.fast.compiled.note.all_seconds, 1)
    return row | {
        "seconds_median": round(median, 3),
        "tokens_per_second": round(sum(batch) / median),
        "peak_gib": round(peak, 2),
        "first_loss": f"{first['loss']:.6f}",
        "grad_norm": f"{first['grad_norm']:.3e}",
    }


def ratios(rows: list[dict[str, Any]]) -> list[str]:
    """How much longer other modes take than compiled layers, with the same rows."""
    names = ("loss", "completion_tokens", "micro_batches")
    timed = [row for row in rows if "seconds_median" in row]
    ours = {tuple(r[n] for n in names): r for r in timed if r["mode"] == "regional"}
    lines = []
    for row in timed:
        case = tuple(row[name] for name in names)
        if case in ours and row["mode"] != "regional":
            ratio = row["seconds_median"] / ours[case]["seconds_median"]
            lines.append(f"{row['mode']}, {case[0]} {case[1]}: {ratio:.2f} times regional's time")
    return lines


def cases_of(options: argparse.Namespace) -> list[list[str]]:
    """Mode, tokens, loss and micro-batches of each."""
    cases = options.cases or [f"{mode}:{n}" for n in options.tokens for mode in options.modes]
    rest = [options.loss, str(options.micro_batches)]
    return [[*parts, *rest[len(parts) - 2 :]] for parts in (case.split(":") for case in cases)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", default=["1037"])
    parser.add_argument("--modes", nargs="+", default=["regional", "off"], choices=MODES)
    parser.add_argument("--loss", default="jsd", choices=LOSSES)
    parser.add_argument("--cases", nargs="+", help="in place of these: MODE:TOKENS[:LOSS[:MICRO]]")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="of a micro-batch")
    parser.add_argument("--checkpointing", default="on", choices=("on", "off"))
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--sampling", default="sequential", help="train_sampling_strategy")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, help="rows are added to this file")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    processor = processor_of_448_pixels()
    student, teacher = build_pair(processor, options.tiny)
    lora = LoraConfig(**LORA)
    pair = get_peft_model(student, lora), teacher
    log = RowLog(options.output, FIELDS, appends=True)
    for mode, tokens, loss, micro_batches in cases_of(options):
        options.loss, options.micro_batches = loss, int(micro_batches)
        torch._dynamo.reset()
        lengths = [int(length) for length in tokens.split(",")]
        log.add(measure(pair, processor, lengths, mode, options))
        say(f"ROW {log.rows[-1]}")
    say("\n".join(ratios(log.rows)))


if __name__ == "__main__":
    main()

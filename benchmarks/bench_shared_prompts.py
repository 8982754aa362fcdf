"""Learning steps of rows that share their prompt: prompts computed once, beside once a row.

    python benchmarks/bench_shared_prompts.py --cases 216:256 1000:256 --output FILE

Qwen3-VL-8B -> 2B shapes, LoRA, one micro-batch of 8 completions of one prompt with a picture, as
num_generations=8 has them. A writer that takes no time gives completions of known lengths. A case
is PROMPT:COMPLETION tokens, or PROMPT:SHORTEST-LONGEST for lengths that are drawn between these,
anew in each step and the same in all modes: no shape comes twice, as with real rollouts. Modes:
"padded" is share_prompts=False, "packed" padding_free=True besides, "shared" the default on a GPU.
In mode "shared" the loss is first compared with full logits of padded rows in float64 softmax; one
that fails has no time. The gradient of the first step is compared with that of the first mode of
its case.
"""

import argparse
import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_train_step import MAX_LOSS_ERRORS
from peft import LoraConfig, get_peft_model
from profile_step import Profiled
from qwen3_vl_shapes import LORA, QUIET, build_pair, processor_of_448_pixels, rows
from record import RowLog, environment, say
from timing import release
from transformers import TrainerCallback

from gold_kernels.jsd import reference
from gold_trainer import GOLDConfig, GOLDTrainer
from gold_trainer.writers import Completion

NUM_ROWS, WARM_UP = 8, 3
PROMPT = 216  # tokens of the benchmarks' prompt, 196 of them its picture's
MODES: dict[str, dict[str, Any]] = {
    "padded": {"share_prompts": False},
    "packed": {"share_prompts": False, "padding_free": True},
    "shared": {"share_prompts": None if torch.cuda.is_available() else True},
}
FIELDS = (
    *("mode", "prompt_tokens", "completion_tokens", "rows", "checkpointing", "status"),
    *("seconds_median", "teacher_ms", "peak_gib", "compile_seconds", "loss_error"),
    *("first_loss", "grad_norm", "gradient_difference"),
    *("device", "torch", "triton", "transformers", "git_sha"),
)


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step, as one vector."""

    def __init__(self) -> None:
        self.first: torch.Tensor | None = None

    def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        if self.first is None:
            grads = (p.grad for p in model.parameters() if p.grad is not None)
            self.first = torch.cat([grad.float().flatten() for grad in grads])


class TeacherTimer:
    """Milliseconds of the teacher's passes on the device."""

    def __init__(self, trainer: GOLDTrainer) -> None:
        self.function, self.events = trainer.teacher.hidden_rows, []
        trainer.teacher.hidden_rows = self  # type: ignore[method-assign]

    def __call__(self, inputs: Any) -> Any:
        if not torch.cuda.is_available():
            return self.function(inputs)
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        result = self.function(inputs)
        pair[1].record()
        self.events.append(pair)
        return result

    @property
    def median(self) -> float:
        times = [start.elapsed_time(end) for start, end in self.events[WARM_UP:]]
        return round(statistics.median(times), 1) if times else 0.0


class KnownWriter:
    """In the place of the student's: tokens of one kind, without a model."""

    def __init__(self, completion: str, token_id: int) -> None:
        first, _, last = completion.partition("-")
        self.low, self.high = int(first), int(last or first)
        self.token_id, self.calls = token_id, 0

    def complete(self, prompts: Any, sampling: Any) -> list[list[Completion]]:
        draw = random.Random(self.calls)
        self.calls += 1
        sizes = [draw.randint(self.low, self.high) for _ in range(NUM_ROWS)]
        written = [Completion([self.token_id] * size, [0.0] * size, 0) for size in sizes]
        return [written for _ in prompts]


def build(
    pair: Any, processor: Any, case: tuple[str, str], options: Any, fields: Any, folder: str
) -> Any:
    steps = options.steps + options.profile
    prompt = int(case[0])
    token_id = processor.tokenizer("a", add_special_tokens=False)["input_ids"][0]
    writer = KnownWriter(case[1], token_id)
    (row,) = rows(processor, 1, 1)
    question = row["prompt"][0]["content"] + " a" * ((prompt - PROMPT) // 2)
    data = [{"prompt": [{"role": "user", "content": question}], "images": row["images"]}]
    has_cuda = torch.cuda.is_available()
    trainer = GOLDTrainer(
        model=pair[0],
        teacher_model=pair[1],
        args=GOLDConfig(
            output_dir=folder,
            per_device_train_batch_size=NUM_ROWS,
            num_generations=NUM_ROWS,
            lmbda=1.0,
            max_completion_length=writer.high,
            max_length=prompt + writer.high + 64,
            max_steps=steps,
            bf16=has_cuda,
            use_cpu=not has_cuda,
            **QUIET,
            optim="sgd",
            learning_rate=1e-9,
            **fields,
        ),
        train_dataset=data * steps,
        processing_class=processor,
    )
    trainer.rollouts.writers["student"].complete = writer.complete
    return trainer, writer


@torch.no_grad()
def loss_error(trainer: GOLDTrainer) -> float:
    """Relative, of the loss of a micro-batch, against full logits of padded rows in float64."""
    rows_of_one = [trainer.train_dataset[0]] * NUM_ROWS
    batch = trainer.data_collator(rows_of_one)
    first = batch.examples[0]
    shared = [replace(e, images=first.images) for e in batch.examples]
    batch = replace(batch, examples=shared, teacher_examples=shared)
    (batch,) = trainer.rollouts.complete([batch], 0)
    trainer.inputs.start([batch])
    assert batch.shares_prompts, "rows share their prompt"
    model = trainer.model.eval()
    inputs = trainer._prepare_inputs(batch)
    with trainer.fast.packing.running(batch):
        fused = trainer.compute_loss(model, inputs)
    padded = trainer.objective.prepare(replace(batch, shares_prompts=False), trainer.inputs.mover)
    tensors, positions = padded.student.tensors, padded.student.scored_rows
    sides = ((model, trainer.student), (trainer.teacher_model, trainer.teacher.side))
    found = []
    for own, side in sides:
        states = own(**tensors, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        found.append((states.flatten(0, 1)[positions].double().split(64), side.head.weight))
    (student, weight), (teacher, teacher_weight) = found
    oracle = sum(
        reference.jsd_rows(s @ weight.double().T, t @ teacher_weight.double().T).sum()
        for s, t in zip(student, teacher, strict=True)
    ) / len(positions)
    model.train()
    return abs(float(fused) - float(oracle)) / float(oracle)


def measure(
    pair: Any, processor: Any, case: tuple[str, str], mode: str, expected: Any, options: Any
) -> tuple[dict[str, Any], torch.Tensor | None]:
    has_cuda = torch.cuda.is_available()
    row = {"mode": mode, "prompt_tokens": case[0], "completion_tokens": case[1], "rows": NUM_ROWS}
    row |= {"checkpointing": options.checkpointing, "status": "ok", **environment()}
    fields = {**MODES[mode], "gradient_checkpointing": options.checkpointing == "on"}
    with tempfile.TemporaryDirectory() as folder:
        trainer, writer = build(pair, processor, case, options, fields, folder)
        if mode == "shared":
            error, limit = loss_error(trainer), MAX_LOSS_ERRORS["jsd"]
            writer.calls = 0
            row["loss_error"] = f"{error:.1e}"
            if not error <= limit:  # a NaN too
                return row | {"status": f"refused: loss error {error:.1e} exceeds {limit}"}, None
        timer = Profiled(options.steps + options.profile, is_on=options.profile)
        gradients, teacher = Gradients(), TeacherTimer(trainer)
        trainer.add_callback(timer)
        trainer.add_callback(gradients)
        release()  # trainers of other cases
        trainer.train()
    first = next(log for log in trainer.state.log_history if "grad_norm" in log)
    say(f"  seconds of all steps: {[round(seconds, 3) for seconds in timer.seconds]}")
    if expected is not None:
        difference = (gradients.first - expected).norm() / expected.norm()
        row["gradient_difference"] = f"{float(difference):.1e}"
    return row | {
        "seconds_median": round(
            statistics.median(timer.seconds[WARM_UP : options.steps] or timer.seconds), 3
        ),
        "teacher_ms": teacher.median,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if has_cuda else 0,
        "compile_seconds": round(trainer.fast.compiled.note.all_seconds, 1),
        "first_loss": f"{first['loss']:.6f}",
        "grad_norm": f"{first['grad_norm']:.3e}",
    }, gradients.first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["216:256", "1000:256"])
    parser.add_argument("--modes", nargs="+", default=["padded", "packed", "shared"], choices=MODES)
    parser.add_argument("--checkpointing", default="on", choices=("on", "off"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="of each mode, as profile_step.py")
    parser.add_argument("--output", type=Path, help="rows are added to this file")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    processor = processor_of_448_pixels()
    student, teacher = build_pair(processor, options.tiny)
    pair = get_peft_model(student, LoraConfig(**LORA)), teacher
    log = RowLog(options.output, FIELDS, appends=True)
    for case in options.cases:
        prompt, _, completion = case.partition(":")
        expected = None
        for mode in options.modes:
            torch._dynamo.reset()
            row, gradient = measure(pair, processor, (prompt, completion), mode, expected, options)
            expected = gradient if expected is None else expected
            log.add(row)
            say(f"ROW {row}")


if __name__ == "__main__":
    main()

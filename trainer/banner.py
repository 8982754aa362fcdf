"""What a run is going to do, in a few lines before its first step."""

from collections.abc import Sized
from typing import Any

from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gold_kernels import __version__
from gold_trainer import models
from gold_trainer.config import GOLDConfig
from gold_trainer.dataset import RowDataset

GIB = 2**30
ADAM_BYTES = 8  # of a trained parameter: two moments in float32


class Banner(TrainerCallback):
    """Printed by the main process. Sizes are taken before anything shards the weights."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, rows: Any) -> None:
        self.num_rows = len(rows) if isinstance(rows, Sized) else None
        self.rows = rows.description if isinstance(rows, RowDataset) else "as each of them is"
        self.sides = [("student", _describe(student))]
        self.sides.append(("teacher", "the student's own weights, below the adapter"))
        own = _bytes(student)
        trained = [p for p in student.parameters() if p.requires_grad]
        changing = sum(p.numel() * (p.element_size() + ADAM_BYTES) for p in trained)
        if teacher is not None and teacher is not student:
            self.sides[1] = ("teacher", _describe(teacher))
            own += _bytes(teacher)
        self.memory = (
            f"weights {own / GIB:.1f} GiB; gradients and moments of Adam {changing / GIB:.1f} GiB; "
            "activations, and for the loss "
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        assert isinstance(args, GOLDConfig), "the trainer has checked it"
        console = Console(highlight=False)
        console.print(f"gold-trainer {__version__}", markup=False)
        for name, text in [*self.sides, *self.lines(args, state)]:
            console.print(f"  {name:10} {text}", markup=False, soft_wrap=True)

    def lines(self, args: GOLDConfig, state: TrainerState) -> list[tuple[str, str]]:
        sizes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
        rows = "a stream of rows" if self.num_rows is None else f"{self.num_rows} rows"
        writer = "the teacher writes" if args.seq_kd else "the rows have"
        shares = f"{args.lmbda:.0%} of micro-batches: the student writes the completions"
        if args.lmbda < 1:
            shares += f"; else {writer} them"
        budget = args.loss_budget_mib or 1024
        return [
            (
                "data",
                f"{rows}; {sizes[0] * sizes[1] * sizes[2]} a step: {sizes[0]} of a device x "
                f"{sizes[1]} micro-batches x {sizes[2]} processes",
            ),
            ("rows", self.rows),
            ("on-policy", shares),
            ("loss", "across tokenizers" if args.use_uld_loss else args.loss),
            ("steps", f"{state.global_step} of {state.max_steps} are done"),
            ("memory", f"{self.memory}{budget:.0f} MiB"),
            ("output_dir", f"{args.output_dir}"),
        ]


def _describe(model: nn.Module) -> str:
    base = models.base_model(model)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = f"{base.config.name_or_path or type(base).__name__}, {_count(total)} parameters"
    return f"{text}, {_count(trained)} of them trained" if trained else text


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())

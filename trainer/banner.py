"""What a run is going to do, in a few lines before its first step."""

import logging
from collections.abc import Mapping, Sized
from typing import Any

from rich.console import Console
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gold_kernels import __version__
from gold_trainer import models
from gold_trainer.activations import activation_bytes
from gold_trainer.caching.store import form_of_cache
from gold_trainer.config import GOLDConfig
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.row_sample import RowSample, sample_rows
from gold_trainer.precision import describe
from gold_trainer.weighting.weighting import Weighting

logger = logging.getLogger(__name__)

GIB = 2**30
ADAM_BYTES = 8  # of a trained parameter: two moments in float32


class Banner(TrainerCallback):
    """Printed by the main process. Sizes are taken before anything shards the weights."""

    def __init__(
        self,
        sides: Mapping[str, Any],  # "student", and "teacher" or None where it is not here
        rows: Any,
        tokenizer: Any,
        weighting: Weighting | None,
    ) -> None:
        student, teacher = sides["student"], sides["teacher"]
        self.weighting = weighting
        self.num_rows = len(rows) if isinstance(rows, Sized) else None
        self.rows, self.tokenizer = rows, tokenizer
        self.config = models.base_model(student).config.get_text_config()
        self.dtypes = " and ".join(
            sorted({str(p.dtype).removeprefix("torch.") for p in student.parameters()})
        )
        self.sides = [("student", _describe(student))]
        self.sides.append(("teacher", "the student's own weights, below the adapter"))
        own = _bytes(student)
        trained = [p for p in student.parameters() if p.requires_grad]
        changing = sum(p.numel() * (p.element_size() + ADAM_BYTES) for p in trained)
        if teacher is not None and teacher is not student:
            self.sides[1] = ("teacher", _describe(teacher))
            own += _bytes(teacher)
        self.memory = f"weights {_gib(own)}; gradients and moments of Adam {_gib(changing)}; "

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        assert isinstance(args, GOLDConfig), "the trainer has checked it"
        if args.teacher_cache is not None:
            form = form_of_cache(args)
            self.sides[1] = ("teacher", f"cached in {args.teacher_cache} (form {form})")
        several = args.teacher_models
        if isinstance(several, dict):
            of_each = "; ".join(f"{key}: {name}" for key, name in several.items())
            cached = "" if args.teacher_cache is None else f", cached in {args.teacher_cache}"
            self.sides[1] = ("teachers", of_each + cached)
        elif args.teacher_model_server_url is not None and args.teacher_cache is None:
            name = args.teacher_model_name_or_path
            self.sides[1] = ("teacher", f"{name}, served at {args.teacher_model_server_url}")
        console = Console(highlight=False)
        console.print(f"gold-trainer {__version__}", markup=False)
        for name, text in [*self.sides, *self.lines(args, state)]:
            console.print(f"  {name:10} {text}", markup=False, soft_wrap=True)

    def lines(self, args: GOLDConfig, state: TrainerState) -> list[tuple[str, str]]:
        sample, kind = RowSample(0, 0, []), "as each of them is"
        if isinstance(self.rows, RowDataset):
            sample, kind = sample_rows(self.rows, self.tokenizer), self.rows.description
        if sample.is_mixed:
            logger.warning("GOLDTrainer: rows are %s.", sample.mixture)
        writer = "the teacher writes" if args.seq_kd else "the rows have"
        shares = f"{args.lmbda:.0%} of micro-batches: the student writes the completions"
        if args.lmbda == 0:
            shares = f"0% of micro-batches: {writer} the completions"
        elif args.lmbda < 1:
            shares += f"; else {writer} them"
        return [
            ("data", self._data(args, sample)),
            ("rows", sample.mixture if sample.is_mixed else kind),
            ("on-policy", shares),
            ("loss", self._loss(args)),
            ("steps", f"{state.global_step} of {state.max_steps} are done"),
            ("precision", describe(args, self.dtypes)),
            ("memory", self._memory(args, sample)),
            ("output_dir", f"{args.output_dir}"),
        ]

    def _loss(self, args: GOLDConfig) -> str:
        loss = describe_loss(args)
        if self.weighting is None:
            return loss
        return f"{loss}; tokens have the weights of {self.weighting.settings['token_weighting']}"

    def _data(self, args: GOLDConfig, sample: RowSample) -> str:
        sizes = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
        rows = "a stream of rows" if self.num_rows is None else f"{self.num_rows} rows"
        step = (
            f"{sizes[0] * sizes[1] * sizes[2]} a step: {sizes[0]} of a device x {sizes[1]} "
            f"micro-batch{'es' * (sizes[1] > 1)} x {sizes[2]} process{'es' * (sizes[2] > 1)}"
        )
        if not sample.lengths or self.num_rows is None:
            return f"{rows}; {step}"
        total = _count(sample.tokens * self.num_rows)
        return f"{rows}; {step}; about {sample.tokens} tokens of text a row, {total} in all"

    def _memory(self, args: GOLDConfig, sample: RowSample) -> str:
        """The activations of the longest micro-batch that the sample lets expect."""
        written = args.max_completion_length if args.lmbda > 0 or args.seq_kd else 0
        limit = args.max_length or sample.longest + written
        length = min(limit, sample.longest + written) if sample.lengths else limit
        size = activation_bytes(
            self.config,
            args.per_device_train_batch_size * length,
            is_checkpointed=bool(args.gradient_checkpointing),
            is_16_bit=args.bf16 or args.fp16 or "float32" not in self.dtypes,
        )
        batch = f"{args.per_device_train_batch_size} x {length} tokens of text"
        activations = "" if size is None else f" roughly {_gib(size)} for {batch}"
        budget = args.loss_budget_mib or 1024
        return f"{self.memory}activations{activations}; the loss up to {_gib(budget * 2**20)}"


def describe_loss(args: GOLDConfig) -> str:
    """Its name, and beta where it has one."""
    has_beta = args.loss == "jsd"
    loss = args.loss
    if args.use_uld_loss:
        loss = f"{'hybrid ' * args.uld_use_hybrid_loss}{args.uld_loss_type} across tokenizers"
        has_beta = args.uld_use_hybrid_loss or args.uld_loss_type != "uld"
    loss += f" of the teacher's {args.loss_top_k} likeliest tokens" if args.loss_top_k else ""
    return loss + (f", beta {args.beta:g}" if has_beta else "")


def _describe(model: nn.Module) -> str:
    base = models.base_model(model)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    name = base.config.name_or_path or type(base).__name__.removeprefix("FSDP")
    text = f"{name}, {_count(total)} parameters"
    return f"{text}, {_count(trained)} of them trained" if trained else text


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def _bytes(model: nn.Module) -> int:
    """Bytes of the weights on this process, without what is offloaded."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(p.numel() * p.element_size() for p in parts if not p.is_meta)

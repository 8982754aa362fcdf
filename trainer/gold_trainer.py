"""GOLDTrainer: distillation of a teacher into a student of its family, on transformers.Trainer.

B sequences, L positions, N scored rows, D hidden size, V vocabulary. The step, in order: rows are
rendered (collator.py), the accumulation window gets its completions (rollout.py) and its token
count, a micro-batch becomes tensors, the teacher's hidden states of the scored rows are taken, and
the student's forward meets the fused loss where its lm_head was (models.py).
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
)

from gold_kernels import fused_linear_jsd
from trainer import models
from trainer.collator import GOLDCollator, Processor, build_inputs, tokenizer_of
from trainer.completions import print_completions
from trainer.config import GOLDConfig
from trainer.dataset import RowDataset
from trainer.metrics import SUMS, MetricWindow
from trainer.rollout import end_ids_of, generate_completions


class GOLDTrainer(Trainer):
    """Trains `model` towards `teacher_model` with the generalized JSD of fused_linear_jsd.

        loss = sum over scored tokens of the global batch of JSD(P, Q) / their number

    Models are objects, folders or hub ids; both vision-language or both text-only, of one family.
    Datasets are map-style, with rows of `messages`, or `prompt` and `completion`, and `image` or
    `images`. Loss and gradients do not depend on how the global batch is split into micro-batches
    and ranks. compute_metrics needs logits, which never exist here, and is refused.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | None = None,
        args: GOLDConfig | None = None,
        data_collator: Callable[[list], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Processor | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
    ) -> None:
        args = GOLDConfig(output_dir="runs/gold") if args is None else args
        teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
        _refuse_unusable(args, teacher_model, compute_metrics, preprocess_logits_for_metrics)
        student_config = _config_of(model, args.model_init_kwargs)
        teacher_config = _config_of(
            teacher_model, args.teacher_model_init_kwargs, args.teacher_model_revision
        )
        models.check_pair(student_config, teacher_config)
        is_vlm = models.is_vision_language(student_config)
        if processing_class is None:
            auto_class = AutoProcessor if is_vlm else AutoTokenizer
            processing_class = auto_class.from_pretrained(student_config._name_or_path)
        models.check_processor(processing_class, is_vlm)

        if isinstance(model, str):
            model = models.load_model(model, args.model_init_kwargs)
        if isinstance(teacher_model, str):
            teacher_model = models.load_model(
                teacher_model, args.teacher_model_init_kwargs, args.teacher_model_revision
            )
        if peft_config is not None:
            model = _add_adapter(model, peft_config, args)
        if args.disable_dropout:
            models.disable_dropout(model)
        self.student_head = models.lm_head(model, "student")
        self.teacher_head = models.lm_head(teacher_model, "teacher")
        self.vocab_size = models.shared_vocab_size(
            self.student_head, self.teacher_head, processing_class
        )
        self.end_ids = end_ids_of(model, processing_class)
        self.placeholder_ids = models.placeholder_ids_of(student_config)
        self.windows = {"train": MetricWindow(), "eval": MetricWindow()}

        def as_rows(dataset: Any, needs_completion: bool) -> Any:
            if dataset is None:
                return None
            if isinstance(dataset, dict):
                return {name: as_rows(part, needs_completion) for name, part in dataset.items()}
            return RowDataset(dataset, needs_completion=needs_completion, is_text=not is_vlm)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or GOLDCollator(processing_class, self.end_ids, args.max_length, self.placeholder_ids),
            train_dataset=as_rows(train_dataset, not args.seq_kd and args.lmbda < 1),
            eval_dataset=as_rows(eval_dataset, not args.seq_kd),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # compute_loss divides by the tokens of the whole window: no second division by its length
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # the same, for transformers before 5.20
        teacher_model.requires_grad_(False).eval()
        self.teacher_model = self.accelerator.prepare_model(teacher_model, evaluation_mode=True)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The window's micro-batches with their completions, and its scored tokens on all ranks."""
        batches = []
        for micro_step in range(num_batches):
            try:
                batch = next(epoch_iterator)
            except StopIteration:
                break
            batches.append(self._with_completions(batch, micro_step))
        if not batches:
            return batches, None
        num_items = sum(len(e.completion_ids) for batch in batches for e in batch["examples"])
        num_items = torch.tensor(num_items, dtype=torch.float32, device=device)
        return batches, self.accelerator.reduce(num_items, reduction="sum")

    def _with_completions(self, batch: dict[str, Any], micro_step: int) -> dict[str, Any]:
        """Decide on- or off-policy, the same way on every rank and after a resume; generate."""
        step = self.state.global_step
        draw = random.Random(f"{self.args.seed} {step} {micro_step}").random()
        is_on_policy = draw < self.args.lmbda
        source = "student" if is_on_policy else "teacher" if self.args.seq_kd else "dataset"
        examples = batch["examples"]
        if source != "dataset":
            examples = self._generate(source, examples)
        is_due = step % self.args.log_completions_steps == 0 and micro_step == 0
        if self.args.log_completions and is_due and self.is_world_process_zero():
            tokenizer = tokenizer_of(self.processing_class)
            limit = self.args.num_completions_to_print
            print_completions(tokenizer, examples, source, step, limit)
        return {**batch, "examples": examples, "is_on_policy": is_on_policy}

    def _generate(self, source: str, examples: list) -> list:
        model = self.model if source == "student" else self.teacher_model
        model = self.accelerator.unwrap_model(model)
        return generate_completions(
            model,
            self.processing_class,
            examples,
            self.end_ids,
            self.placeholder_ids,
            self.args,
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Pictures and tokens become tensors here, one micro-batch at a time."""
        examples = inputs["examples"]
        side = build_inputs(self.processing_class, examples)
        batch = {"student": side.tensors, "teacher": side.tensors, "scored_rows": side.scored_rows}
        batch |= {
            "num_completions": len(examples),
            "is_on_policy": inputs.get("is_on_policy", False),
        }
        return super()._prepare_inputs(batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch; its rows weigh 1 / num_items_in_batch (None: 1 / N)."""
        rows = inputs["scored_rows"]  # (N,)
        teacher_hidden = models.teacher_hidden_rows(
            self.teacher_model, self.teacher_head, inputs["teacher"], rows
        )
        row_weights = None
        if num_items_in_batch is not None:
            # DDP and FSDP average gradients over ranks, num_items_in_batch counts all of them
            row_weights = (self.accelerator.num_processes / num_items_in_batch).expand(len(rows))
        window = self.windows["train" if model.training else "eval"]

        def loss_of(hidden: Tensor) -> Tensor:  # (B, L, D) -> ()
            loss, metrics = fused_linear_jsd(
                models.gather_rows(hidden, rows),
                self.student_head.weight,
                teacher_hidden,
                self.teacher_head.weight,
                row_weights,
                beta=self.args.beta,
                temperature=self.args.loss_temperature,
                student_bias=self.student_head.bias,
                teacher_bias=self.teacher_head.bias,
                vocab_size=self.vocab_size,
                chunk_size=self.args.chunk_size,
                return_metrics=True,
            )
            window.add(metrics, inputs["num_completions"], inputs["is_on_policy"])
            return loss

        with models.head_replaced(self.student_head, loss_of):
            loss = model(**inputs["student"], use_cache=False).logits
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Mean loss of an evaluation batch; where seq_kd rows have no completion, the teacher's."""
        examples = inputs["examples"]
        if any(example.completion_ids is None for example in examples):
            inputs = {**inputs, "examples": self._generate("teacher", examples)}
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the window's metrics, averaged over its scored tokens on all ranks."""
        for mode, key, prefix in (("train", "loss", ""), ("eval", "eval_loss", "eval_")):
            if key in logs:
                window = self.windows[mode]
                sums = window.sums
                if sums is None:
                    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.args.device)
                means = window.means(self.accelerator.reduce(sums, reduction="sum"))
                logs = {**logs, **{prefix + name: value for name, value in means.items()}}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: image tokens are unknown until the micro-batch is built."""
        return 0


def _refuse_unusable(
    args: GOLDConfig, teacher_model: Any, compute_metrics: Any, preprocess_logits: Any
) -> None:
    if not isinstance(args, GOLDConfig):
        raise ValueError(
            f"GOLDTrainer: args must be a GOLDConfig, got {type(args).__name__}; it takes every "
            "field of TrainingArguments."
        )
    if teacher_model is None:
        raise ValueError(
            "GOLDTrainer: a teacher is expected, got None; pass teacher_model= or set "
            "teacher_model_name_or_path."
        )
    if compute_metrics is not None or preprocess_logits is not None:
        raise ValueError(
            "GOLDTrainer: compute_metrics and preprocess_logits_for_metrics must be None: the "
            "fused loss never makes the logits they read; the log has entropies, KLs and top-1 "
            "agreement, and a TrainerCallback can generate answers."
        )


def _config_of(
    model: PreTrainedModel | str, init_kwargs: dict[str, Any] | None, revision: str | None = None
) -> PretrainedConfig:
    if not isinstance(model, str):
        return models.base_model(model).config
    return models.load_config(model, init_kwargs, revision)


def _add_adapter(model: PreTrainedModel, peft_config: Any, args: GOLDConfig) -> nn.Module:
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ValueError(
            "GOLDTrainer: peft_config needs the package peft, which is not installed; "
            "pip install 'gold-kernels[peft]'."
        ) from error
    if args.gradient_checkpointing:
        model.enable_input_require_grads()  # else the checkpointed layers see no gradient
    return get_peft_model(model, peft_config)

"""GOLDTrainer: distillation of a teacher into a student of its family, on transformers.Trainer.

B sequences, L positions, N scored rows, D hidden size, V vocabulary. The step, in order: rows are
rendered (collator.py), the accumulation window gets its completions (rollout.py) and its token
count, a micro-batch becomes tensors, the teacher's hidden states of the scored rows are taken, and
the student's forward meets the fused loss where its lm_head was (models.py).
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from gold_kernels import fused_linear_jsd
from trainer import loading, models
from trainer.collator import Example, GOLDCollator, Processor, build_inputs, tokenizer_of
from trainer.completions import print_completions
from trainer.config import GOLDConfig
from trainer.dataset import RowDataset
from trainer.metrics import MetricWindow
from trainer.rollout import end_ids_of, generate_completions

logger = logging.getLogger(__name__)


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
        _refuse_unusable(model, teacher_model, args, compute_metrics, preprocess_logits_for_metrics)
        student_config, processing_class = loading.check_configs(
            model, teacher_model, args, processing_class
        )
        is_vlm = models.is_vision_language(student_config)
        self.is_text = not is_vlm
        train_dataset = self._as_rows(train_dataset, not args.seq_kd and args.lmbda < 1)
        eval_dataset = self._as_rows(eval_dataset, not args.seq_kd)

        set_seed(args.seed)  # of a new adapter
        model, teacher_model = loading.load_models(
            model, teacher_model, args, processing_class, peft_config
        )
        self.student_head = models.lm_head(model, "student")
        self.teacher_head = models.lm_head(teacher_model, "teacher")
        self.student_form = models.LogitForm.from_config(student_config, "student")
        self.teacher_form = models.LogitForm.from_config(
            models.base_model(teacher_model).config, "teacher"
        )
        forms = self.student_form, self.teacher_form
        self.loss_options = {
            "beta": args.beta,
            "temperature": args.loss_temperature,
            "vocab_size": models.shared_vocab_size(
                self.student_head, self.teacher_head, processing_class
            ),
            "chunk_size": args.chunk_size,
            "logit_scale": tuple(form.scale for form in forms),
            "final_logit_softcapping": tuple(form.softcap for form in forms),
            "return_metrics": True,
        }
        self.end_ids = end_ids_of(model, processing_class)
        self.placeholder_ids = models.placeholder_ids_of(student_config)
        self.windows = {"train": MetricWindow(), "eval": MetricWindow()}
        _adapt_to_devices(args, is_vlm)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or GOLDCollator(processing_class, self.end_ids, args.max_length, self.placeholder_ids),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # compute_loss divides by the tokens of the whole window: no second division by its length
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # the same, for transformers before 5.20
        self.teacher_model = loading.place_frozen(teacher_model, self.accelerator.device)

    def _as_rows(self, dataset: Any, needs_completion: bool) -> Any:
        """The dataset, or each dataset of a dict, read as Rows."""
        if isinstance(dataset, dict):
            return {name: self._as_rows(part, needs_completion) for name, part in dataset.items()}
        if dataset is None or isinstance(dataset, RowDataset):
            return dataset
        rows = RowDataset(dataset, needs_completion=needs_completion, is_text=self.is_text)
        _ = rows[0]  # columns that do not fit show before weights are read and folders made
        return rows

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if not isinstance(eval_dataset, str):  # a key of the evaluation datasets
            eval_dataset = self._as_rows(eval_dataset, not self.args.seq_kd)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return super().get_test_dataloader(self._as_rows(test_dataset, not self.args.seq_kd))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The window's micro-batches with their completions, and its scored tokens on all ranks."""
        self.windows["train"].start()
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
        # full, not tensor: a fill on the device where a copy would wait for it
        num_items = torch.full((), num_items, dtype=torch.float32, device=device)
        return batches, self.accelerator.reduce(num_items, reduction="sum")

    def _with_completions(self, batch: dict[str, Any], micro_step: int) -> dict[str, Any]:
        """Decide on- or off-policy, the same way on every rank and after a resume; generate."""
        step = self.state.global_step
        place = f"{self.args.seed} {step} {micro_step}"
        is_on_policy = random.Random(place).random() < self.args.lmbda
        source = "student" if is_on_policy else "teacher" if self.args.seq_kd else "dataset"
        examples = batch["examples"]
        if source != "dataset":
            examples = self._generate(source, examples, f"{place} {self.args.process_index}")
        is_due = step % self.args.log_completions_steps == 0 and micro_step == 0
        if self.args.log_completions and is_due and self.is_world_process_zero():
            tokenizer = tokenizer_of(self.processing_class)
            limit = self.args.num_completions_to_print
            print_completions(tokenizer, examples, source, step, limit)
        return {**batch, "examples": examples, "is_on_policy": is_on_policy}

    def _generate(self, source: str, examples: list[Example], place: str) -> list[Example]:
        """Completions of the student or the teacher; place, where in the run, seeds them."""
        is_student = source == "student"
        model = self.accelerator.unwrap_model(self.model) if is_student else self.teacher_model
        with self.accelerator.autocast():
            return generate_completions(
                model,
                self.processing_class,
                examples,
                self.end_ids,
                self.placeholder_ids,
                self.args,
                random.Random(place).getrandbits(63),
            )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Pictures and tokens become tensors here, one micro-batch at a time."""
        examples = inputs["examples"]
        side = build_inputs(self.processing_class, examples)
        tensors = {name: self._to_device(tensor) for name, tensor in side.tensors.items()}
        return super()._prepare_inputs(
            {
                "student": tensors,
                "teacher": tensors,  # one family: the same inputs
                "scored_rows": self._to_device(side.scored_rows),
                "num_completions": len(examples),
                "is_on_policy": inputs.get("is_on_policy", False),
            }
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        """From pinned memory, so that building the next micro-batch does not wait for this one."""
        if self.args.device.type == "cuda" and self.args.dataloader_pin_memory:
            tensor = tensor.pin_memory()
        return tensor.to(self.args.device, non_blocking=True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch; its rows weigh 1 / num_items_in_batch (None: 1 / N)."""
        rows = inputs["scored_rows"]  # (N,)
        with self.accelerator.autocast():  # the wrapper gives it to the student only
            teacher_hidden = models.teacher_hidden_rows(
                self.teacher_model, self.teacher_head, self.teacher_form, inputs["teacher"], rows
            )
        row_weights = None
        if num_items_in_batch is not None:
            # DDP and FSDP average gradients over ranks, num_items_in_batch counts all of them
            row_weights = (self.accelerator.num_processes / num_items_in_batch).expand(len(rows))
        window = self.windows["train" if model.training else "eval"]

        def loss_at_head(hidden: Tensor) -> Tensor:  # (B, L, D) -> ()
            loss, metrics = fused_linear_jsd(
                models.gather_rows(hidden, rows),
                self.student_head.weight,
                teacher_hidden,
                self.teacher_head.weight,
                row_weights,
                student_bias=self.student_head.bias,
                teacher_bias=self.teacher_head.bias,
                **self.loss_options,
            )
            window.add(metrics, inputs["num_completions"], inputs["is_on_policy"])
            return loss

        student = self.accelerator.unwrap_model(model)
        with models.head_replaced(student, self.student_head, self.student_form, loss_at_head):
            loss = model(**inputs["student"], use_cache=False).logits
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Mean loss of an evaluation batch; where seq_kd rows have no completion, the teacher's,
        the same at every evaluation.
        """
        examples = inputs["examples"]
        if any(example.completion_ids is None for example in examples):
            place = f"{self.args.seed} eval {[example.index for example in examples]}"
            inputs = {**inputs, "examples": self._generate("teacher", examples, place)}
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Metrics are means over the scored tokens of all rows, whatever the batch size; rows that
        are repeated to fill the last batches of several ranks count again.
        """
        window, train_window = self.windows["eval"], self.windows["train"]
        window.reset()
        started = time.perf_counter()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self.accelerator.reduce(window.sums(self.args.device), reduction="sum")
        for name, value in window.means(sums).items():
            if name not in ("off_policy_loss", "tokens_per_second"):
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        train_window.skip(time.perf_counter() - started)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training window's metrics, means over its scored tokens on all ranks."""
        if "loss" in logs:
            window = self.windows["train"]
            sums = self.accelerator.reduce(window.sums(self.args.device), reduction="sum")
            means = window.means(sums)
            del means["loss"]  # the Trainer's is the mean over steps
            logs = {**logs, **means}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: image tokens are unknown until the micro-batch is built."""
        return 0


def _refuse_unusable(
    model: Any, teacher_model: Any, args: Any, compute_metrics: Any, preprocess_logits: Any
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
    if teacher_model is model and not isinstance(model, str):
        raise ValueError(
            "GOLDTrainer: student and teacher must be two objects, got one: the teacher is frozen; "
            "load it a second time."
        )
    sides = ("model", model), ("teacher_model", teacher_model)
    for name, value in sides:
        if not isinstance(value, str) and getattr(args, f"{name}_init_kwargs") is not None:
            raise ValueError(
                f"GOLDTrainer: {name}_init_kwargs must be None for a model that is loaded, got "
                f"{getattr(args, f'{name}_init_kwargs')}; pass them to from_pretrained."
            )
    if compute_metrics is not None or preprocess_logits is not None:
        raise ValueError(
            "GOLDTrainer: compute_metrics and preprocess_logits_for_metrics must be None: the "
            "fused loss never makes the logits they read; the log has entropies, KLs and top-1 "
            "agreement, and a TrainerCallback can generate answers."
        )


def _adapt_to_devices(args: GOLDConfig, is_vlm: bool) -> None:
    """One process drives one device; ranks may differ in which weights a micro-batch uses."""
    if args.n_gpu > 1:
        logger.warning(
            "GOLDTrainer: one process uses one GPU, %d are visible; start it with `accelerate "
            "launch` or `torchrun` to use them all.",
            args.n_gpu,
        )
        args._n_gpu = 1  # as Trainer does for a model spread over devices: no DataParallel
    if is_vlm and args.ddp_find_unused_parameters is None:
        # With gradient checkpointing the Trainer's own choice is False, and a rank whose
        # micro-batch has no picture would leave the others waiting for its vision gradients.
        args.ddp_find_unused_parameters = True

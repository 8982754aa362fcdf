"""GOLDTrainer: distillation of a teacher into a student, on transformers.Trainer.

B sequences, L positions, N scored rows, D hidden size, V vocabulary. The step, in order: rows are
rendered (collator.py), the accumulation window gets its completions (window.py) and its token
count, a micro-batch becomes tensors, the teacher's hidden states of the scored rows are taken, and
the student's forward meets the fused loss where its lm_head was (models.py).
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import (
    PreTrainedModel,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from gold_kernels import JSDMetrics, TokenAlignment, fused_linear_jsd
from gold_trainer import arguments, loading, models
from gold_trainer.collator import GOLDCollator, ModelInputs, Processor, build_inputs
from gold_trainer.config import GOLDConfig
from gold_trainer.dataset import RowDataset
from gold_trainer.metrics import MetricWindow
from gold_trainer.pairing import CompletionPairs, PairCollator
from gold_trainer.rollout import end_ids_of
from gold_trainer.uld_step import ULDBatch, ULDObjective
from gold_trainer.window import RepeatSampler, Rollouts, fetch_window, window_rows


class GOLDTrainer(Trainer):
    """Trains `model` towards `teacher_model` with the generalized JSD of fused_linear_jsd.

        loss = sum over scored tokens of the global batch of JSD(P, Q) / their number

    With use_uld_loss the two may have different tokenizers and processors, and the loss is that of
    fused_linear_uld, a mean over groups of tokens (see ULDFields). The teacher's processor is
    teacher_processing_class, else loaded from where the teacher was. A student with an adapter
    needs no teacher_model: its own weights, without the adapter, then are the teacher.

    Models are objects, folders or hub ids; both vision-language or both text-only. Datasets are
    map-style, with rows of `messages`, or `prompt` and `completion`, and `image` or `images`. Loss
    and gradients do not depend on how the global batch is split into micro-batches
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
        teacher_processing_class: Processor | None = None,
    ) -> None:
        args = GOLDConfig(output_dir="runs/gold") if args is None else args
        teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
        arguments.refuse_unusable(
            model,
            teacher_model,
            args,
            data_collator,
            compute_metrics,
            preprocess_logits_for_metrics,
            peft_config,
        )
        student_config, processing_class = loading.check_configs(
            model, teacher_model, args, processing_class
        )
        is_vlm = models.is_vision_language(student_config)
        if teacher_model is None:
            teacher_processing_class = processing_class
        elif args.use_uld_loss:
            teacher_processing_class = loading.load_teacher_processor(
                teacher_model, args, teacher_processing_class, is_vlm
            )
        self.is_text = not is_vlm
        arguments.refuse_splits(train_dataset)
        train_dataset = self._as_rows(train_dataset, not args.seq_kd and args.lmbda < 1)
        eval_dataset = self._as_rows(eval_dataset, not args.seq_kd)

        set_seed(args.seed)  # of a new adapter
        model, teacher_model = loading.load_models(
            model, teacher_model, args, processing_class, teacher_processing_class, peft_config
        )
        self.student_head = models.lm_head(model, "student")
        self.is_own_teacher = teacher_model is model
        self.teacher_head = models.lm_head(
            teacher_model, "teacher", is_own_teacher=self.is_own_teacher
        )
        self._set_loss(model, teacher_model, processing_class, teacher_processing_class, args)
        arguments.adapt_to_devices(args, is_vlm)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self.pairs or self.student_side,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # compute_loss divides by the tokens of the whole window: no second division by its length
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # the same, for transformers before 5.20
        if not self.is_own_teacher:
            teacher_model = loading.place_frozen(teacher_model, self.accelerator.device)
        self.teacher_model = teacher_model

    def _set_loss(
        self,
        model: nn.Module,
        teacher_model: nn.Module,
        processing_class: Processor,
        teacher_processing_class: Processor | None,
        args: GOLDConfig,
    ) -> None:
        """Collators of both sides, options of the loss, windows of its metrics."""
        configs = (models.base_model(side).config for side in (model, teacher_model))
        forms = [
            models.LogitForm.from_config(config, side)
            for config, side in zip(configs, ("student", "teacher"), strict=True)
        ]
        self.student_form, self.teacher_form = forms
        self.loss_options = {
            "beta": args.beta,
            "chunk_size": args.chunk_size,
            "logit_scale": tuple(form.scale for form in forms),
            "final_logit_softcapping": tuple(form.softcap for form in forms),
            "return_metrics": True,
        }
        self.student_side = _collator_of(model, processing_class, args)
        self.teacher_side, self.pairs, self.uld = self.student_side, None, None
        if args.use_uld_loss:
            self.teacher_side = _collator_of(teacher_model, teacher_processing_class, args)
            pairs = CompletionPairs(args, self.student_side, self.teacher_side)
            self.pairs = PairCollator(self.student_side, self.teacher_side, pairs)
            self.uld = ULDObjective(args, pairs, self.loss_options)
        else:
            self.loss_options["temperature"] = args.loss_temperature
            self.loss_options["vocab_size"] = models.shared_vocab_size(
                self.student_head,
                self.teacher_head,
                processing_class,
                self.student_side.placeholder_ids,
            )
        self.rollouts = Rollouts(
            args,
            self.student_side,
            self.teacher_side,
            self.pairs,
            is_own_teacher=self.is_own_teacher,
        )
        self.windows = {
            name: MetricWindow() if self.uld is None else self.uld.window()
            for name in ("train", "eval")
        }

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

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        """With num_generations > 1 rows come as RepeatSampler has them."""
        if self.args.num_generations == 1:
            return super()._get_train_sampler(train_dataset)
        return RepeatSampler(
            len(self.train_dataset if train_dataset is None else train_dataset),
            self.args,
            num_windows=self.get_total_train_batch_size(self.args) // window_rows(self.args),
            epoch=lambda: int(self.state.epoch or 0),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | None]:
        """The window's micro-batches with their completions, and its scored tokens on all ranks."""
        self.windows["train"].start()
        batches = fetch_window(epoch_iterator, num_batches)
        if not batches:
            return batches, None
        student = self.accelerator.unwrap_model(self.model)
        models_of = {"student": student, "teacher": self.teacher_model}
        with self.accelerator.autocast():
            batches = self.rollouts.complete(batches, self.state.global_step, models_of)
        # full, not tensor: a fill on the device where a copy would wait for it
        num_items = [torch.full((), count, device=device) for count in self._count_items(batches)]
        return batches, self.accelerator.reduce(torch.stack(num_items).float(), reduction="sum")

    def _count_items(self, batches: list[dict[str, Any]]) -> list[int]:
        """What the loss is a mean over: tokens, or groups and (for the cross-entropy) labels."""
        counted = [b for b in batches if self.pairs is None or not b["is_on_policy"]]
        num_tokens = sum(len(e.completion_ids) for batch in counted for e in batch["examples"])
        if self.pairs is None:
            return [num_tokens]
        return [sum(batch["alignment"].groups.num_groups for batch in batches), num_tokens]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Pictures and tokens become tensors here, one micro-batch at a time."""
        examples = inputs["examples"]
        student = self._tensors_of(build_inputs(self.student_side.processor, examples))
        teacher = student  # one family: the same inputs
        if self.pairs is not None:
            teacher_examples = inputs["teacher_examples"]
            teacher = self._tensors_of(build_inputs(self.teacher_side.processor, teacher_examples))
        prepared = super()._prepare_inputs(
            {
                "student": student["tensors"],
                "teacher": teacher["tensors"],
                "scored_rows": student["scored_rows"],
                "teacher_rows": teacher["scored_rows"],
                "num_completions": len(examples),
                "is_on_policy": inputs.get("is_on_policy", False),
            }
        )
        if self.pairs is not None:
            # After the Trainer's own function, which does not know named tuples.
            groups = inputs["alignment"].groups
            prepared["uld"] = ULDBatch(
                TokenAlignment(
                    *(self._to_device(f) if isinstance(f, Tensor) else f for f in groups)
                ),
                inputs["alignment"].skip_reasons,
                student["labels"],
                prepared["num_completions"],
                prepared["is_on_policy"],
            )
        return prepared

    def _tensors_of(self, side: ModelInputs) -> dict[str, Any]:
        """One side's inputs on the device, the labels as (N,)."""
        return {
            "tensors": {name: self._to_device(tensor) for name, tensor in side.tensors.items()},
            "scored_rows": self._to_device(side.scored_rows),
            "labels": self._to_device(side.labels.flatten()[side.scored_rows + 1]),
        }

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
        # the wrapper gives autocast to the student only
        teaching = models.teaching(self.teacher_model, self.is_own_teacher)
        with self.accelerator.autocast(), teaching:
            teacher_hidden = models.teacher_hidden_rows(
                self.teacher_model,
                self.teacher_head,
                self.teacher_form,
                inputs["teacher"],
                inputs["teacher_rows"],
            )
        item_weights = None
        if num_items_in_batch is not None:
            # DDP and FSDP average gradients over ranks, num_items_in_batch counts all of them
            item_weights = self.accelerator.num_processes / num_items_in_batch.clamp_min(1)
        window = self.windows["train" if model.training else "eval"]

        def loss_at_head(hidden: Tensor) -> Tensor:  # (B, L, D) -> ()
            student_hidden = models.gather_rows(hidden, inputs["scored_rows"])
            rows = student_hidden, self.student_head, teacher_hidden, self.teacher_head
            if self.uld is not None:
                return self.uld.loss(*rows, inputs["uld"], item_weights, window)
            loss, metrics = self._jsd(*rows, item_weights)
            window.add(metrics, inputs["num_completions"], inputs["is_on_policy"])
            return loss

        student = self.accelerator.unwrap_model(model)
        with models.head_replaced(student, self.student_head, self.student_form, loss_at_head):
            loss = model(**inputs["student"], use_cache=False).logits
        return (loss, {"loss": loss}) if return_outputs else loss

    def _jsd(
        self,
        student_hidden: Tensor,  # (N, D_s)
        student_head: nn.Linear,
        teacher_hidden: Tensor,  # (N, D_t)
        teacher_head: nn.Linear,
        item_weights: Tensor | None,  # () or (1,)
    ) -> tuple[Tensor, JSDMetrics]:
        row_weights = None if item_weights is None else item_weights.expand(len(student_hidden))
        return fused_linear_jsd(
            student_hidden,
            student_head.weight,
            teacher_hidden,
            teacher_head.weight,
            row_weights,
            student_bias=student_head.bias,
            teacher_bias=teacher_head.bias,
            **self.loss_options,
        )

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
            with self.accelerator.autocast():
                (inputs,) = self.rollouts.generate("teacher", self.teacher_model, [inputs], place)
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
        if self.accelerator.use_distributed and not (self.is_in_train or self.is_fsdp_enabled):
            # What is marked as prepared, here without DDP, train() leaves as it is: every rank
            # would learn from its own rows alone.
            self.model._is_accelerate_prepared = False
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


def _collator_of(model: nn.Module, processor: Processor, args: GOLDConfig) -> GOLDCollator:
    """With the tokens that end this model's answers and those that stand for pictures."""
    config = models.base_model(model).config
    return GOLDCollator(
        processor,
        end_ids_of(model, processor),
        args.max_length,
        models.placeholder_ids_of(config),
    )

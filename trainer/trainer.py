"""GOLDTrainer: distillation of a teacher into a student, on transformers.Trainer.

A step, in order, and who does it:

    row      dataset row -> messages, pictures, completion            data/rows.py
    batch    rows -> examples of both sides, in data loader workers   objective.collator
    window   examples -> completions, by a writer where it is due     window.py, writers/
    tensors  examples -> inputs on the device, their scored rows      objective.prepare
    teacher  inputs -> its last hidden states at the scored rows      teachers/
    student  inputs -> its hidden states, at the place of its head    loss_at_head.py
    loss     hidden states and heads of both sides -> a scalar        objectives/
    log      sums by name -> means                                    metrics.py
    survive  lock, resume, NaN, signals, errors                       survival/

B sequences, L positions, N scored rows of a side (N_s, N_t), D hidden size.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from gold_trainer import arguments, loading, models, refusals, sharding
from gold_trainer.ahead import WindowSource
from gold_trainer.banner import Banner
from gold_trainer.batches import MicroBatch, WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.data.bad_rows import SkippedRows, tolerant_collator
from gold_trainer.data.evaluating import Evaluating
from gold_trainer.data.rows import Row
from gold_trainer.data.streams import read_rows
from gold_trainer.fields.library_options import check_best_metric
from gold_trainer.hub import pushing
from gold_trainer.metrics import MetricWindow
from gold_trainer.model_card import card_facts, write_card
from gold_trainer.objectives.by_teacher import Objective, make_objective
from gold_trainer.precision import fit_to_model
from gold_trainer.preparing import prepare
from gold_trainer.rendering.collator import Processor
from gold_trainer.rendering.prompts import tokenizer_of
from gold_trainer.router_loss import with_router_loss
from gold_trainer.sides import Side
from gold_trainer.speed.compile_note import CompileNote
from gold_trainer.speed.inputs import Inputs
from gold_trainer.speed.step import FastStep
from gold_trainer.survival import checkpoints
from gold_trainer.survival.callback_states import CallbackStates
from gold_trainer.survival.nonfinite import NonFiniteGuard, is_bad
from gold_trainer.survival.resuming import Resuming, settings_of_run
from gold_trainer.survival.savable import saved_as_it_came
from gold_trainer.survival.stopping import Stopper
from gold_trainer.survival.survive import survive
from gold_trainer.teachers import check_cached, make_teacher, source_of
from gold_trainer.weighting.weighting import hidden_rows, make_weighting
from gold_trainer.window import RepeatSampler, Rollouts, window_rows
from gold_trainer.writers import connect, make_writers


class GOLDTrainer(arguments.KnownArguments, Resuming, Evaluating):
    """Trains `model` towards `teacher_model`, by default with the generalized JSD of teacher P and
    student Q:

        loss = sum over scored tokens of the global batch of JSD(P, Q) / their number

    args.loss names another loss (see LossFields). With use_uld_loss the two may have different
    tokenizers and processors; the loss is that of fused_linear_uld, a mean over groups of tokens
    (see ULDFields). The teacher's processor then is teacher_processing_class, else it is loaded
    from where the teacher was. A student with an adapter needs no teacher_model: without one, the
    weights below the adapter are the teacher.

    Models are objects, folders or hub ids; both vision-language or both text-only. A model object
    needs its processor or tokenizer as processing_class; peft_config adds an adapter. Rows are
    those of docs/data.md. Loss and gradients do not depend on how the global batch is split into
    micro-batches and ranks. token_weighting: see ScoredTokens. ValueError says what to change.
    """

    saves_at_end = False  # whether who trains it saves the student then, as the command does

    def __init__(
        self,
        *,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | None = None,
        args: GOLDConfig | None = None,
        data_collator: Callable[[list[Row]], Any] | None = None,  # makes WindowBatches
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Processor | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        teacher_processing_class: Processor | None = None,
        token_weighting: Callable[..., Tensor] | str | None = None,  # of ScoredTokens
    ) -> None:
        args = GOLDConfig(output_dir="runs/gold") if args is None else args
        arguments.check_arguments(model, teacher_model, args, callbacks, optimizers, data_collator)
        weighting = make_weighting(args, token_weighting)
        teacher_model = source_of(teacher_model, args)
        hooks = data_collator, compute_metrics, preprocess_logits_for_metrics
        refusals.refuse_unusable(model, teacher_model, args, *hooks, peft_config)
        processors = processing_class, teacher_processing_class
        self.prepared = prepare(model, teacher_model, args, *processors)
        processing_class = self.prepared.student_processor
        self.args = args  # the Trainer sets it later
        refusals.refuse_datasets(train_dataset, eval_dataset, args)
        train_dataset = read_rows(train_dataset, args, **self.prepared.row_options)
        eval_dataset = self._eval_rows(eval_dataset)
        arguments.check_collator(data_collator, train_dataset)
        connection = connect(args, model, peft_config)
        set_seed(args.seed)  # of a new adapter
        student = loading.load_student(model, args, peft_config)
        self.student = Side.of(student, "student", processing_class, args)
        self.teacher = make_teacher(teacher_model, student, self.prepared.teacher_processor, args)
        self.objective: Objective = make_objective(self.prepared, args, self.student, self.teacher)
        self.objective.weigh_tokens(weighting)
        own = self.objective.collator
        check_cached(self.teacher, train_dataset, eval_dataset, own)
        self.skipped = SkippedRows(args)
        refusals.adapt_to_devices(args, is_vlm=not self.prepared.is_text)
        fit_to_model(args, models.base_model(student))
        collate = tolerant_collator(data_collator or own, own.blank, args.skipped_reasons)
        with saved_as_it_came(student, processing_class):
            super().__init__(
                model=student,
                args=args,
                data_collator=collate,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=arguments.of_student(optimizers, student),
            )
        self._set_up(connection)

    def _set_up(self, connection: Any) -> None:  # to a server that writes
        """What needs the accelerator, which the Trainer has made."""
        args: GOLDConfig = self.args
        student: Any = self.model
        # compute_loss divides by the tokens of the whole window: no second division by its length
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # the same, for transformers before 5.20
        self.teacher.place(self.accelerator.device)
        note = CompileNote(self.callback_handler.callbacks)
        collators = self.objective.collators
        writers = make_writers(student, self.teacher, collators, args, connection, note)
        sides = {"student": student, "teacher": self.teacher.model}
        tokenizer = tokenizer_of(self.prepared.student_processor)
        self.fast = FastStep(args, student, self.teacher, note)
        self.inputs = Inputs(self.objective, args, self._prepare_input, self.fast)
        self.rollouts = Rollouts(args, self.objective, writers, sides, tokenizer)
        self.windows = {name: MetricWindow(self.objective) for name in ("train", "eval")}
        self.guard = NonFiniteGuard(args, self.accelerator)
        names = self.windows["eval"].names(has_aux_loss=models.has_router_loss(student))
        check_best_metric(args, names, self.eval_dataset)
        sharding.prepare(self.accelerator, student, args.optim)
        self.pictures_for_all = sharding.PicturesForAll(
            self.accelerator, self.teacher.model, self.objective.collators
        )
        self.window_source = WindowSource(args, self.rollouts, self.pictures_for_all)
        refusals.warn_of_tiny_rate(args)
        banner = Banner(sides, self.train_dataset, tokenizer, self.objective.weighting)
        self.callback_handler.callbacks.insert(0, banner)  # before the progress bar's line
        self.stopper = Stopper()
        self.add_callback(CallbackStates(self.callback_handler.callbacks))
        self.add_callback(self.stopper)
        self.add_callback(self.skipped)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # True, "auto", or a checkpoint's folder
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """A signal ends the run with a checkpoint and KeyboardInterrupt or SystemExit(143); an
        error is raised once there is one.
        """
        run = partial(super().train, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
        return survive(self, resume_from_checkpoint, run)

    @property
    def teacher_model(self) -> nn.Module | None:
        return self.teacher.model

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """With num_generations > 1 rows come as RepeatSampler has them."""
        if self.args.num_generations == 1:
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return RepeatSampler(
            len(rows),
            self.args,
            num_windows=self.get_total_train_batch_size(self.args) // window_rows(self.args),
            epoch=lambda: int(self.state.epoch or 0),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[WindowBatch], Tensor | None]:
        """The window's micro-batches with their completions, and what the loss is a mean over:
        units and labels of the objective, on all ranks.
        """
        if 0 < self.state.max_steps <= self.state.global_step:  # resumed where it had ended
            return [], None
        if isinstance(self.train_dataset, IterableDataset):
            loader = self.callback_handler.train_dataloader
            epoch_iterator = self.window_source.of_stream(loader, self.state)
        self.windows["train"].start()
        self.windows["train"].keep()
        self.guard.start()
        with self.accelerator.autocast():
            batches = self.window_source.next(epoch_iterator, num_batches, self.state)
        self.inputs.start(batches)
        if not batches:
            return batches, None
        # full, not tensor: a fill on the device where a copy would wait for it
        counts = [*self.objective.num_items(batches), *self.skipped.count(batches)]
        num_items = [torch.full((), count, device=device) for count in counts]
        totals = self.accelerator.reduce(torch.stack(num_items).float(), reduction="sum")
        self.guard.num_items = self.skipped.add(totals)
        return batches, self.guard.num_items

    # The Trainer takes a batch for a dict of tensors, hands it from method to method, and looks
    # into it in the methods below only.
    def _prepare_inputs(self, inputs: WindowBatch) -> MicroBatch:  # type: ignore[override]
        """Pictures and tokens become tensors here, one micro-batch at a time."""
        return self.inputs.take(inputs)

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,  # (2,) units and labels; None: of the batch
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the mean over the global batch."""
        with self.accelerator.autocast():  # the wrapper gives autocast to the student only
            teacher_hidden = hidden_rows(self.teacher, inputs, self.inputs.passes)
        item_weights = None
        if num_items_in_batch is not None:
            # DDP and FSDP average gradients over ranks, num_items_in_batch counts all of them
            item_weights = self.accelerator.num_processes / num_items_in_batch.clamp_min(1)
        window = self.windows["train" if model.training else "eval"]

        def loss_at_head(hidden: Tensor) -> Tensor:  # (N_s, D_s) -> ()
            loss, sums = self.objective.loss(
                hidden,
                self.student.head,
                teacher_hidden,
                self.teacher.side.head,
                inputs,
                item_weights,
            )
            window.add(self.objective.batch_counts(inputs), sums, inputs.is_on_policy)
            if inputs.is_on_policy:
                self.rollouts.check(hidden, self.student, inputs.student)
            return loss

        student = self.accelerator.unwrap_model(model)
        loss, output = self.student.run(student, model, inputs.student, loss_at_head)
        steps = 1 if item_weights is None else self.current_gradient_accumulation_steps
        loss = with_router_loss(loss, output, student, window, steps, inputs.is_on_policy)
        if model.training:
            rows = (example.index for example in inputs.student.examples)
            self.guard.add(rows, is_bad(teacher_hidden), loss, inputs.bad_weights)
            self.inputs.look_ahead()  # while the device works
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        is_last = self.accelerator.sync_gradients  # of its window
        find = partial(self.window_source.look_ahead, self.state) if is_last else None
        with self.inputs.preparing(find), self.fast.running(inputs, model):
            return self.guard.loss_to_log(super().training_step(model, inputs, *args, **kwargs))

    def _get_grad_norm(
        self, model: nn.Module, grad_norm: Tensor | float | None = None
    ) -> Tensor | float | None:
        """Between the last backward and the optimizer's step: whether the step is taken."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        wants_stop = self.stopper.signal is not None
        verdict = self.guard.decide(model, self.state.global_step + 1, norm, wants_stop)
        self.stopper.must_stop |= verdict.must_stop
        if verdict.is_skipped:
            model.zero_grad()  # an optimizer leaves weights without a gradient as they are
            self.windows["train"].restore()
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.stopper.remember()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Complete, with its mark, or absent."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        settings = settings_of_run(self.args, self.objective.weighting, self.train_dataset)
        with checkpoints.saving(folder, self.accelerator, settings):
            self.stopper.is_saving = True
            self.skipped.keep(self.state)
            super()._save_checkpoint(model, trial)
            self.stopper.is_saving = False

    def _save_rng_state(self, output_dir: str) -> None:
        """All ranks have written when the main one deletes older checkpoints."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        model: Any = self.model
        self.guard.check_weights(model, output_dir or self.args.output_dir)
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            sharding.save_whole(self, output_dir or self.args.output_dir)
        if not _internal_call and output_dir in (None, self.args.output_dir):
            self.create_model_card()

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        sharding.save_whole(self, self.args.output_dir)
        with pushing(self.args.output_dir):
            return super().push_to_hub(*args, **kwargs)

    def create_model_card(  # type: ignore[override]  # names of models, loss and rows are known
        self, *args: Any, dataset: str | None = None, **kwargs: Any
    ) -> None:
        """README.md beside the weights, of what this class knows; dataset names the data."""
        if self.is_world_process_zero():
            write_card(self.args, dataset=dataset, **card_facts(self))

    def prediction_step(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: WindowBatch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Mean loss of an evaluation batch."""
        (inputs,) = self.pictures_for_all.add([inputs])
        with self.accelerator.autocast():
            inputs = self.rollouts.evaluated(inputs)
        self.skipped.count_evaluated(inputs)
        with torch.no_grad(), self.fast.evaluating():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        assert isinstance(loss, Tensor), "outputs were not asked for"
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Metrics are means over the scored tokens of all rows, each once, whatever the batch size
        and the number of ranks.
        """
        window, train_window = self.windows["eval"], self.windows["train"]
        window.reset()
        self.skipped.start_evaluation()
        sharding.refuse_early_evaluation(self)
        started = time.perf_counter()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        sharding.forget_preparation(self)
        totals = self.accelerator.reduce(window.totals(self.args.device), reduction="sum")
        assert output.metrics is not None, "evaluation_loop makes a dict"
        skipped = self.skipped.evaluation_logs(self.accelerator)
        for name, value in (window.means(totals) | skipped).items():
            if name not in ("off_policy_loss", "tokens_per_second"):
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        train_window.skip(time.perf_counter() - started)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training window's metrics, means over its scored tokens on all ranks."""
        is_due = "loss" in logs or "train_loss" in logs  # at the end too: steps since the last log
        if "loss" in logs:
            window = self.windows["train"]
            totals = self.accelerator.reduce(window.totals(self.args.device), reduction="sum")
            means = window.means(totals)
            del means["loss"]  # the Trainer's is the mean over steps
            logs = self.guard.logs({**logs, **means, **self.rollouts.logs(self.accelerator)})
        if is_due:
            logs = {**logs, **self.skipped.logs()}
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: WindowBatch) -> int:  # type: ignore[override]
        """Not counted: image tokens are unknown until the micro-batch is built."""
        return 0

"""Arguments that GOLDTrainer cannot use, and those that it adapts to the devices."""

import logging
from collections.abc import Sized
from typing import Any

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from gold_trainer import models
from gold_trainer.adapters import check_adapter
from gold_trainer.config import GOLDConfig
from gold_trainer.data.row_errors import shown
from gold_trainer.data.streams import is_stream
from gold_trainer.data.tables import refuse_tables
from gold_trainer.fields.checks import refuse_given
from gold_trainer.fields.library_options import check_library_options
from gold_trainer.fields.teacher import PLACES
from gold_trainer.hub import check_login
from gold_trainer.nearest import did_you_mean
from gold_trainer.precision import refuse_fp16

SMALL_RATE = 1e-6
# Names of report_to whose package has another name on the registry.
PACKAGES = {
    "azure_ml": "azureml-core",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "dvclive": "dvclive",
}

logger = logging.getLogger(__name__)


def refuse_unusable(
    model: Any,
    teacher_model: Any,
    args: GOLDConfig,
    data_collator: Any,
    compute_metrics: Any,
    preprocess_logits: Any,
    peft_config: Any,
) -> None:
    refuse_reports(args)
    check_library_options(args)
    refuse_fp16(args)
    check_login(args)
    check_adapter(peft_config, args)
    warn_of_no_crossentropy(args)
    has_adapter = peft_config is not None or (
        not isinstance(model, str) and models.has_adapter(model)
    )
    if teacher_model is None and not has_adapter:
        raise ValueError(
            "GOLDTrainer: a teacher is expected, got None; pass teacher_model=, or set "
            "teacher_model_name_or_path, or give the student an adapter (peft_config=): its own "
            "weights then are the teacher."
        )
    refuse_places(teacher_model, args)
    refuse_split_teacher(args)
    if teacher_model is model and not isinstance(model, str):
        raise ValueError(
            "GOLDTrainer: student and teacher must be two objects, got one: the teacher is frozen; "
            "load it a second time."
        )
    sides = [("model", model)]
    if teacher_model is not None:
        sides.append(("teacher_model", teacher_model))
    for name, value in sides:
        if not isinstance(value, str) and getattr(args, f"{name}_init_kwargs") is not None:
            raise ValueError(
                f"GOLDTrainer: {name}_init_kwargs must be None for a model that is loaded, got "
                f"{getattr(args, f'{name}_init_kwargs')}; pass them to from_pretrained."
            )
    if not isinstance(teacher_model, str | None) and args.teacher_model_revision is not None:
        raise ValueError(
            "GOLDTrainer: teacher_model_revision must be None for a teacher that is loaded, got "
            f"{args.teacher_model_revision!r}; pass it to from_pretrained."
        )
    if compute_metrics is not None or preprocess_logits is not None:
        raise ValueError(
            "GOLDTrainer: compute_metrics and preprocess_logits_for_metrics must be None: the "
            "fused loss never makes the logits they read; the log has entropies, KLs and top-1 "
            "agreement, and a TrainerCallback can generate answers."
        )
    if args.use_uld_loss and data_collator is not None:
        raise ValueError(
            "GOLDTrainer: data_collator must be None with use_uld_loss, got "
            f"{type(data_collator).__name__}; rows are rendered for two processors: change the "
            "dataset instead."
        )


def refuse_no_batch(args: GOLDConfig, rows: Any) -> None:
    """Refuse rows that fill no batch: no step would be taken, and the run would end as if it had
    been one.
    """
    size = args.train_batch_size * args.world_size
    num_rows = len(rows) * args.num_generations if isinstance(rows, Sized) else size
    if args.dataloader_drop_last and num_rows < size:
        raise ValueError(
            f"GOLDTrainer: dataloader_drop_last must be False where the rows fill no batch, got "
            f"True and {num_rows} rows for {size}; leave it out, or set a smaller "
            "per_device_train_batch_size."
        )


def refuse_places(teacher_model: Any, args: GOLDConfig) -> None:
    """Refuse places of the teacher's weights that this run cannot have."""
    if teacher_model is None:
        remedy = ": its weights are where the student's are; pass teacher_model="
        must_be = "None for a student that is its own teacher"
        refuse_given(args, PLACES, must_be, remedy, "GOLDTrainer")
    device, sharding = args.teacher_device, args.teacher_sharding
    if device is not None and device != "cpu" and args.world_size > 1:
        instead = "set teacher_sharding='fsdp'" if args.teacher_cache is None else "leave it out"
        raise ValueError(
            f"GOLDTrainer: teacher_device must be None with {args.world_size} processes, got "
            f"{device!r}, which all of them would fill; {instead}, or start one process."
        )
    if sharding is not None and args.world_size == 1:
        raise ValueError(
            f"GOLDTrainer: teacher_sharding must be None with one process, got {sharding!r}; start "
            "several with accelerate launch, or set teacher_offload='cpu'."
        )


def refuse_split_teacher(args: GOLDConfig) -> None:
    size, own = args.teacher_batch_size, args.per_device_train_batch_size
    if size is not None and size < own and args.world_size > 1:
        raise ValueError(
            f"GOLDTrainer: teacher_batch_size must be at least per_device_train_batch_size={own} "
            f"with {args.world_size} processes, got {size}: all of them must run the "
            "teacher equally often; lower per_device_train_batch_size."
        )


def refuse_cut_pictures(args: GOLDConfig, is_text: bool) -> None:
    if args.on_long_prompt == "truncate_left" and not is_text:
        raise ValueError(
            "GOLDTrainer: on_long_prompt must be 'error' or 'skip' for a vision-language student, "
            "got 'truncate_left', which would cut prompts through their pictures; set 'skip', or "
            "raise max_length."
        )


def refuse_reports(args: GOLDConfig) -> None:
    """A package that is missing shows before models are loaded."""
    available = get_available_reporting_integrations()
    assert isinstance(args.report_to, list), "TrainingArguments makes one"
    for name in args.report_to:
        if name not in (*INTEGRATION_TO_CALLBACK, "none"):
            unset = str(name).lower() in ("none", "null", "false", "no", "")
            known = ("none", *sorted(INTEGRATION_TO_CALLBACK))
            remedy = "; write none." if unset else ""
            if not unset and "," not in str(name):
                remedy = did_you_mean(str(name), known)
            raise ValueError(
                f"GOLDTrainer: report_to must be among {', '.join(known)}, got {str(name)!a}"
                f"{remedy or '; write them as a list.'}"
            )
        if name != "none" and name in INTEGRATION_TO_CALLBACK and name not in available:
            package = PACKAGES.get(name, name)
            raise ValueError(
                f"GOLDTrainer: report_to needs the package of {name}, which is not installed; pip "
                f"install {package}, or set report_to='none'."
            )


def warn_of_tiny_rate(args: GOLDConfig) -> None:
    if 0 < args.learning_rate < SMALL_RATE:
        logger.warning(
            "GOLDTrainer: learning_rate=%g (the default is TRL's 1e-7) hardly moves the weights; "
            "1e-5 is usual for all weights, 1e-4 for an adapter.",
            args.learning_rate,
        )


def warn_of_no_crossentropy(args: GOLDConfig) -> None:
    name = "uld_crossentropy_weight" if args.use_uld_loss else "crossentropy_weight"
    if args.lmbda == 1 and getattr(args, name) > 0:
        logger.warning(
            "GOLDTrainer: %s=%g has no effect in training with lmbda=1.0: cross-entropy is for "
            "completions that the student did not write; lower lmbda.",
            name,
            getattr(args, name),
        )


def warn_of_no_evaluation(args: GOLDConfig) -> None:
    """Warn where the run ends before its first evaluation."""
    if args.eval_strategy != "steps" or args.eval_on_start or args.max_steps <= 0:
        return
    for name in ("eval_steps", "eval_delay"):
        value = getattr(args, name) or 0
        is_ratio = name == "eval_steps" and value < 1
        if (value * args.max_steps if is_ratio else value) > args.max_steps:
            logger.warning(
                "GOLDTrainer: nothing is evaluated with %s=%g, the run ends after max_steps=%d; "
                "lower it.",
                name,
                value,
                args.max_steps,
            )


def refuse_splits(train_dataset: Any) -> None:
    refuse_tables(train_dataset)
    if isinstance(train_dataset, dict):
        raise ValueError(
            "GOLDTrainer: train_dataset must be one dataset, got a dict of "
            f"{', '.join(map(str, train_dataset)) or 'none'}; pass one of its splits."
        )


def refuse_datasets(train_dataset: Any, eval_dataset: Any, args: GOLDConfig) -> None:
    """Refuse datasets that do not fit the run; no row is looked at yet."""
    refuse_splits(train_dataset)
    if is_stream(train_dataset):
        warn_of_one_epoch(args)
    is_due = args.eval_strategy not in (None, "no") or args.eval_on_start
    if eval_dataset is None and is_due:
        name = "eval_on_start" if args.eval_strategy in (None, "no") else "eval_strategy"
        raise ValueError(
            f"GOLDTrainer: eval_dataset must hold rows with {name}, got None; pass eval_dataset=, "
            f"or leave {name} out."
        )
    if is_due:
        warn_of_no_evaluation(args)
    if isinstance(eval_dataset, dict) and (None in eval_dataset.values() or not eval_dataset):
        raise ValueError(
            "GOLDTrainer: eval_dataset must be a dataset, or a dict of at least one by name, got "
            f"{shown({name: type(part).__name__ for name, part in eval_dataset.items()})}; pass "
            "the rows, or leave eval_dataset and eval_strategy out."
        )


def warn_of_one_epoch(args: GOLDConfig) -> None:
    names = ("logging_strategy", "eval_strategy", "save_strategy")
    given = [name for name in names if getattr(args, name) == "epoch"]
    if given:
        logger.warning(
            "GOLDTrainer: of a stream nobody knows the length, so that its one epoch is the whole "
            "run of max_steps=%d: with %s='epoch' all is done at its end; set 'steps'.",
            *(args.max_steps, "=".join(given)),
        )


def adapt_to_devices(args: GOLDConfig, is_vlm: bool) -> None:
    """One process uses one GPU. Without pictures a micro-batch does not run the vision tower:
    ranks may differ in the weights that they use.
    """
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

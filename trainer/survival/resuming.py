"""Which checkpoint a run goes on from, and whether the folder it writes to is another run's."""

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from gold_trainer import models
from gold_trainer.config import GOLDConfig
from gold_trainer.data.dataset import RowDataset
from gold_trainer.survival import checkpoints
from gold_trainer.weighting.weighting import Weighting

logger = logging.getLogger(__name__)

# What a run learns and from whom, from which rows in which order; kept with each checkpoint.
SETTINGS = (
    *("loss", "loss_top_k", "beta", "use_uld_loss", "uld_loss_type", "lmbda", "seq_kd"),
    *("train_on", "seed", "max_length", "token_weighting", "token_weighting_kwargs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"),
    *("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs"),
    *("teacher_models", "teacher_cache", "teacher_cache_form"),
    *("max_completion_length", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "stop_strings", "generation_kwargs", "use_vllm"),
    *("vllm_mode", "vllm_sync_frequency", "async_rollouts"),
    *("loss_kwargs", "loss_temperature", "loss_teacher_temperature", "logits_dtype"),
    *("distillation_weight", "crossentropy_weight"),
    *("uld_use_hybrid_loss", "uld_hybrid_matched_weight", "uld_hybrid_unmatched_weight"),
    *("uld_token_merge_strategy", "uld_crossentropy_weight", "uld_distillation_weight"),
    *("uld_student_temperature", "uld_teacher_temperature", "uld_group_temperature"),
    *("use_extended_uld", "uld_relaxed_overlap", "uld_skip_student_eos", "uld_skip_teacher_eos"),
    *("max_pixels", "on_bad_row", "teacher_tokenizer_name_or_path"),
    *("train_sampling_strategy", "data_seed", "dataloader_drop_last", "on_long_prompt"),
    *("chat_template_kwargs", "disable_dropout", "neftune_noise_alpha", "max_grad_norm"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("bf16", "fp16"),
)
# Those of them with which a step has other rows: an epoch is taken up where that many steps end.
OF_STEPS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations"),
    *("processes", "train_on", "train_sampling_strategy", "seed", "data_seed", "rows"),
    "dataloader_drop_last",
)
# What comes back with the optimizer, whatever the config says.
OF_OPTIMIZER = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"),
)
# Of an adapter's config: where its weights came from, and what does not change their meaning.
NO_SHAPE = (
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
    *("task_type", "lora_dropout", "init_lora_weights", "runtime_config", "eva_config"),
    *("corda_config", "loftq_config", "total_step", "tinit", "tfinal", "deltaT"),
)
WORDS = {"true": True, "false": False, "none": None}


class Resuming:
    """A Trainer that loads checkpoints without a warning of tied weights, which they hold once."""

    model: Any

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        state, missing = self.model.state_dict(keep_vars=True), load_result.missing_keys
        held = {id(weight) for name, weight in state.items() if name not in missing}
        missing = [name for name in missing if id(state.get(name)) not in held]
        parent: Any = super()
        parent._issue_warnings_after_load(load_result._replace(missing_keys=missing))


def find_checkpoint(
    wanted: str | bool | None,
    output_dir: str,
    student: nn.Module,
    *,
    keeps_earlier: bool = False,
    **kind: Any,
) -> str | None:
    """wanted: True, the newest complete checkpoint of output_dir; "auto", the same, or None where
    there is none; a folder; or nothing, which is refused among checkpoints of an earlier run unless
    keeps_earlier. ValueError where it cannot be gone on from.
    """
    wanted = as_wanted(wanted)
    if wanted in (None, False):
        earlier = checkpoints.checkpoints_in(Path(output_dir))
        for folder in earlier:
            check_same_student(folder, student)
        if earlier and not keeps_earlier:
            raise earlier_run(output_dir, earlier[-1])
        if earlier:
            logger.warning("%s", earlier_run(output_dir, earlier[-1]))
        return None
    if isinstance(wanted, str) and wanted != "auto":
        return _given(Path(wanted), output_dir, student, kind)
    newest, refused = checkpoints.find_newest(Path(output_dir), **kind)
    if newest is not None:
        for folder, reason in refused.items():
            logger.warning(
                "GOLDTrainer: %s is incomplete (%s): going on from %s.",
                folder,
                reason,
                newest,
            )
        _check_same_kind(newest, student)
        return str(newest)
    found = "; ".join(f"{folder} is incomplete ({reason})" for folder, reason in refused.items())
    if wanted == "auto":
        if found:
            logger.warning("GOLDTrainer: starting from the beginning: %s.", found)
        return None
    raise ValueError(
        "GOLDTrainer: resume_from_checkpoint=True needs a complete checkpoint in output_dir, got "
        f"{found or f'none in {output_dir}'}; start without it, or set "
        "resume_from_checkpoint='auto', which starts from the beginning then."
    )


def _given(folder: Path, output_dir: str, student: nn.Module, kind: dict[str, Any]) -> str:
    reason = checkpoints.what_is_wrong(folder, **kind)
    if reason is not None:
        newest, _ = checkpoints.find_newest(Path(output_dir), **kind)
        there = (
            f"{output_dir}/checkpoint-STEP" if newest is None else f"{newest}, which is complete"
        )
        raise ValueError(
            f"GOLDTrainer: resume_from_checkpoint must be a complete checkpoint, got {folder}: "
            f"{reason}; resume from {there}, or bring the file back (save_only_model=True leaves "
            "out what resuming needs)."
        )
    _check_same_kind(folder, student)
    return str(folder)


def as_wanted(wanted: str | bool | None) -> str | bool | None:
    """The words of a command line as what they mean."""
    return WORDS.get(wanted.lower(), wanted) if isinstance(wanted, str) else wanted


def earlier_run(output_dir: str, folder: Path) -> ValueError:
    """A new run among the checkpoints of an earlier one: which is resumed, which is deleted?"""
    return ValueError(
        "GOLDTrainer: output_dir must hold no checkpoints of an earlier run where a new one "
        f"begins, got {output_dir} with {folder.name}; resume_from_checkpoint=True goes on from "
        "there, overwrite_output_dir=True deletes them, another output_dir keeps both."
    )


def delete_earlier(output_dir: str) -> None:
    for folder in checkpoints.checkpoints_in(Path(output_dir)):
        logger.warning("GOLDTrainer: deleting %s, as overwrite_output_dir says.", folder)
        checkpoints.clear(folder)


def settings_of_run(
    args: GOLDConfig, weighting: Weighting | None = None, rows: Any = None
) -> dict[str, Any]:
    """rows: of training, whose number and beginning are told where they have a length."""
    settings = {name: getattr(args, name) for name in (*SETTINGS, *OF_OPTIMIZER)}
    options: Any = args.model_init_kwargs or {}
    settings |= {"processes": args.world_size, "dtype": options.get("dtype")}
    settings |= {} if weighting is None else weighting.settings
    settings["optim"] = OptimizerNames(args.optim).value
    schedule = settings["lr_scheduler_type"] = SchedulerType(args.lr_scheduler_type).value
    if not schedule.startswith("constant"):  # its rates follow from the number of all steps
        settings |= {name: getattr(args, name) for name in ("max_steps", "num_train_epochs")}
    if isinstance(rows, RowDataset):
        settings |= {"rows": len(rows.rows), "first_row": rows.beginning}
    return json.loads(json.dumps(settings, default=str))  # as it is read: a tuple is a list


def check_settings(
    folder: Path, args: GOLDConfig, weighting: Weighting | None = None, rows: Any = None
) -> None:
    """Another optimizer cannot use a checkpoint's state. Other settings may change: a warning."""
    there, here = checkpoints.settings_of(folder), settings_of_run(args, weighting, rows)
    changed = {name: value for name, value in there.items() if here.get(name, value) != value}
    if "optim" in changed:
        raise ValueError(
            f"GOLDTrainer: a resumed run must have its checkpoint's optimizer, got "
            f"optim={here['optim']!r} and {folder} of {there['optim']!r}; set "
            f"optim={there['optim']!r}, or start a new run with that folder as the student."
        )
    kept = {name: changed.pop(name) for name in OF_OPTIMIZER if name in changed}
    if changed:
        changes = ", ".join(f"{name} {old} -> {here[name]}" for name, old in changed.items())
        has_other_rows = any(name in OF_STEPS for name in changed)
        rows = "; a step has other rows: some come twice in this epoch, or not at all"
        changes += rows if has_other_rows else ""
        logger.warning("GOLDTrainer: going on from %s with other settings: %s.", folder, changes)
    if kept:
        stays = ", ".join(f"{name} stays {old}, not {here[name]}" for name, old in kept.items())
        logger.warning(
            "GOLDTrainer: going on from %s with its optimizer: %s; to change it start a new run "
            "with that folder as the student.",
            folder,
            stays,
        )


def _check_same_kind(folder: Path, student: nn.Module) -> None:
    check_same_student(folder, student)
    there, here = _adapter_of_checkpoint(folder), _adapter_of_student(student)
    for name in there.keys() & here.keys():
        if there[name] != here[name]:
            raise ValueError(
                f"GOLDTrainer: a resumed run must have its checkpoint's adapter, got {name} "
                f"{here[name]!r} and {folder} with {there[name]!r}; set {name} to that, or start a "
                "new run."
            )


def _adapter_of_checkpoint(folder: Path) -> dict[str, Any]:
    """What its weights mean; empty where there is none, or one of another name."""
    path = folder / "adapter_config.json"
    return _shape_of(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _adapter_of_student(student: nn.Module) -> dict[str, Any]:
    if not models.has_adapter(student):
        return {}
    adapter: Any = student
    return _shape_of(adapter.peft_config[adapter.active_adapter].to_dict())


def _shape_of(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config that say its shape, as JSON has them; sets in order."""
    shape = {}
    for name, value in config.items():
        if name not in NO_SHAPE:
            value = list(value) if isinstance(value, set) else value
            value = json.loads(
                json.dumps(value, default=lambda other: getattr(other, "value", str(other)))
            )
            is_names = isinstance(value, list) and all(isinstance(v, str) for v in value)
            shape[name] = sorted(value) if is_names else value
    return shape


def check_same_student(folder: Path, student: nn.Module) -> None:
    """ValueError if the checkpoint is that of a model that the student is not."""
    there = _kind_of_checkpoint(folder)
    here = _kind_of_student(student)
    for name, value in there.items():
        if name in here and value != here[name]:
            raise ValueError(
                f"GOLDTrainer: checkpoints in output_dir must be of the student that trains, got "
                f"{folder} with {name} {value} where the student has {here[name]}; choose "
                "another output_dir or checkpoint."
            )


def _kind_of_student(student: nn.Module) -> dict[str, Any]:
    base = models.base_model(student)
    adapter = "present" if models.has_adapter(student) else "absent"
    return {"adapter": adapter} | _kind_of_config(base.config, type(base).__name__)


def _kind_of_checkpoint(folder: Path) -> dict[str, Any]:
    """What its files tell; nothing of what they do not."""
    has_adapter = (folder / "adapter_config.json").is_file()
    kind = {"adapter": "present"} if has_adapter else {}
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError):  # none is there, or one that needs code of its own
        return kind
    if not has_adapter:
        kind["adapter"] = "absent"
    return kind | _kind_of_config(config, (config.architectures or [None])[0])


def _kind_of_config(config: PretrainedConfig, architecture: str | None) -> dict[str, Any]:
    text = config.get_text_config().to_dict()
    kind = {
        "model_type": config.model_type,
        "architecture": architecture,
        "vocab_size": text.get("vocab_size"),
        "hidden_size": text.get("hidden_size"),
    }
    return {name: value for name, value in kind.items() if value is not None}

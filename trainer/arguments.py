"""Arguments of GOLDTrainer's constructor: their names and kinds, looked at before models load."""

import inspect
import os
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from gold_kernels.triton.launch import GPU_DEVICES, is_interpreted
from gold_trainer.batches import WindowBatch
from gold_trainer.config import GOLDConfig
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.row_errors import told
from gold_trainer.nearest import did_you_mean
from gold_trainer.survival.callback_states import check_early_stopping

# Arguments that other trainers have, and what to do here.
OTHER_ARGUMENTS = {
    "tokenizer": "pass processing_class=",
    "processor": "pass processing_class=",
    "teacher_tokenizer": "pass teacher_processing_class=",
    "teacher_processor": "pass teacher_processing_class=",
    "teacher": "pass teacher_model=",
    "student": "pass model=",
    "student_model": "pass model=",
    "ref_model": "pass teacher_model=",
    "teacher_models": "set it in GOLDConfig",
    "model_init": "pass model=, and make a trainer for each trial",
    "model_init_kwargs": "set it in GOLDConfig",
    "compute_loss_func": "set loss in GOLDConfig, docs/add_a_loss.md adds one",
    "optimizer_cls_and_kwargs": "set optim and optim_args in GOLDConfig, or pass optimizers=",
    "formatting_func": "write rows with messages, or prompt and completion: docs/data.md",
    "reward_funcs": "there are no rewards here: the teacher is what is learnt from",
    "dataset": "pass train_dataset=",
    "config": "pass args=",
}


class KnownArguments:
    """Refuses what the constructor of a class does not take in the words of its callers."""

    def __new__(cls, *values: Any, **given: Any) -> "KnownArguments":
        taken = inspect.signature(cls.__init__).parameters
        kinds = [parameter.kind for parameter in taken.values()]
        if values and not any(k.name.startswith(("POSITIONAL", "VAR_P")) for k in kinds[1:]):
            raise ValueError(
                f"{cls.__name__}: arguments must be given by name, got {len(values)} without one; "
                "write model=, teacher_model=, args=, train_dataset=."
            )
        for name in given if inspect.Parameter.VAR_KEYWORD not in kinds else ():
            if name not in taken:
                known = [key for key in taken if key != "self"]
                other = OTHER_ARGUMENTS.get(name)
                meant = f"; {other}." if other else did_you_mean(name, known)
                raise ValueError(
                    f"{cls.__name__}: there is no argument {name!r}"
                    f"{meant or '; they are ' + ', '.join(known) + '.'}"
                )
        return super().__new__(cls)

    def hyperparameter_search(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"{type(self).__name__}: hyperparameter_search is not supported, each trial needs a "
            "student of its own; make a trainer for each, and compare evaluate()['eval_loss']."
        )


def check_arguments(
    model: Any, teacher_model: Any, args: Any, callbacks: Any, optimizers: Any, data_collator: Any
) -> None:
    """Arguments of another kind than they must be, before anything is read."""
    _check_config(args)
    for name, given in (("model", model), ("teacher_model", teacher_model)):
        if isinstance(given, os.PathLike | type):
            remedy = "str(it)" if isinstance(given, os.PathLike) else "what from_pretrained gives"
            raise ValueError(
                f"GOLDTrainer: {name} must be a model, or a folder or hub id as text, got "
                f"{_kind_of(given)}; pass {remedy}."
            )
    are_listed = isinstance(callbacks, list | None)
    for callback in (callbacks or ()) if are_listed else (callbacks,):
        kind = callback if isinstance(callback, type) else type(callback)
        if not are_listed or not issubclass(kind, TrainerCallback):
            raise ValueError(
                "GOLDTrainer: callbacks must be a list of TrainerCallbacks, got "
                f"{kind.__name__}{' in it' * are_listed}; write callbacks=[...], and "
                "derive a class of your own from transformers.TrainerCallback."
            )
    check_early_stopping(callbacks or (), args)
    is_pair = isinstance(optimizers, tuple | list) and len(optimizers) == 2
    optimizer, schedule = optimizers if is_pair else (optimizers, None)
    if not is_pair or not isinstance(optimizer, torch.optim.Optimizer | None):
        raise ValueError(
            "GOLDTrainer: optimizers must be a pair of an optimizer and its schedule or None, got "
            f"{_kind_of(optimizers)}; write optimizers=(optimizer, None)."
        )
    if optimizer is not None and isinstance(model, str):
        raise ValueError(
            "GOLDTrainer: optimizers must be (None, None) for a student that is loaded here, got "
            f"{type(optimizer).__name__} over weights of something else; load the student first."
        )
    if schedule is not None and getattr(schedule, "optimizer", None) is not optimizer:
        raise ValueError(
            "GOLDTrainer: the schedule in optimizers must be of the optimizer beside it, got "
            f"{type(schedule).__name__} of another; pass both, or set lr_scheduler_type."
        )
    if not callable(data_collator) and data_collator is not None:
        raise ValueError(
            "GOLDTrainer: data_collator must make WindowBatches of Rows, got "
            f"{type(data_collator).__name__}; leave it out, or derive one from GOLDCollator."
        )


def _kind_of(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_kind_of, value))})"
    return value.__name__ if isinstance(value, type) else type(value).__name__


def of_student(optimizers: Any, student: nn.Module) -> Any:
    """The optimizers; ValueError for one that would leave the student as it is."""
    optimizer = optimizers[0]
    if optimizer is None:
        return optimizers
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "GOLDTrainer: the optimizer in optimizers must hold parameters that the student "
            f"trains, got {type(optimizer).__name__} with none of them; make it of the model that "
            "is passed, with the adapter on it, or set optim."
        )
    return optimizers


def check_collator(collate: Any, rows: Any) -> None:
    """Call the user's own collator on the first row, before weights are read."""
    if collate is None or not isinstance(rows, RowDataset):
        return
    try:
        batch = collate([rows[rows.first_index]])
    except ValueError:  # of the row, which may be left out
        return
    except (TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(
            "GOLDTrainer: data_collator must make a WindowBatch of a list of Rows, got "
            f"{type(error).__name__} of {_name_of(collate)} ({told(error)}); leave it out, or "
            "derive one from GOLDCollator."
        ) from error
    if not isinstance(batch, WindowBatch):
        raise ValueError(
            "GOLDTrainer: data_collator must make a WindowBatch of a list of Rows, got "
            f"{type(batch).__name__} of {_name_of(collate)}; leave it out, or derive one from "
            "GOLDCollator."
        )


def _name_of(collate: Any) -> str:
    return getattr(collate, "__name__", type(collate).__name__)


def _check_config(args: Any) -> None:
    if not isinstance(args, GOLDConfig):
        raise ValueError(
            f"GOLDTrainer: args must be a GOLDConfig, got {type(args).__name__}; it takes every "
            "field of TrainingArguments."
        )
    args.check_again()
    is_alone = args.parallel_mode.value != "distributed"
    fsdp_config: Any = args.fsdp_config or {}  # TrainingArguments has read it
    if args.fsdp and is_alone and not fsdp_config.get("xla"):
        raise ValueError(
            "GOLDTrainer: fsdp must be left out where no launcher has started the process, got "
            f"{args.fsdp!r}; start it with accelerate launch or torchrun, also on one GPU."
        )
    is_triton = args.loss_backend == "triton"
    if is_triton and args.device.type not in GPU_DEVICES and not is_interpreted():
        raise ValueError(
            "GOLDTrainer: loss_backend must be None or 'torch' without a GPU, got 'triton' on "
            f"{args.device}; leave it out: it takes the one that fits the device."
        )

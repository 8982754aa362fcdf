"""The card of a saved student: who taught it, by which loss, on what, and how well."""

from collections.abc import Mapping, Sized
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

import gold_kernels
from gold_trainer import models
from gold_trainer.banner import describe_loss
from gold_trainer.config import GOLDConfig
from gold_trainer.fields.checks import as_dict

if TYPE_CHECKING:
    from gold_trainer.trainer import GOLDTrainer

MARK = "<!-- written by gold-trainer; a card without this line is left alone -->"
OTHERS = ("library_name: peft", "generated_from_trainer")  # cards of libraries, of no one's hand
SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "world_size", "lmbda", "seq_kd", "max_length", "seed"),
)
OF_ONE_TOKENIZER = ("loss_temperature", "loss_teacher_temperature", "crossentropy_weight")
OF_TWO_TOKENIZERS = (
    *("uld_student_temperature", "uld_teacher_temperature", "uld_crossentropy_weight"),
)
METRICS = (
    *("loss", "forward_kl", "reverse_kl", "top1_agreement", "student_entropy"),
    *("uld_loss", "matched_loss", "unmatched_loss", "student_top_mass", "teacher_top_mass"),
    *("eval_loss", "eval_top1_agreement"),
)


def card_facts(trainer: "GOLDTrainer") -> dict[str, Any]:
    """What write_card says of a trainer's run."""
    student: Any = trainer.accelerator.unwrap_model(trainer.model)
    teacher, rows = trainer.teacher.model, trainer.train_dataset
    weighting = trainer.objective.weighting
    name = trainer.args.teacher_model_name_or_path or ""  # of one that is cached
    several = trainer.args.teacher_models
    if isinstance(several, dict):
        name = ", ".join(several.values())
    if teacher is not None:
        name = models.base_model(teacher).config.name_or_path
    return {
        "student": models.base_model(student).config.name_or_path,
        "teacher": name,
        "has_adapter": models.has_adapter(student),
        "weighting": None if weighting is None else weighting.settings["token_weighting"],
        "num_rows": len(rows) if isinstance(rows, Sized) else None,
        "step": trainer.state.global_step,
        "history": trainer.state.log_history,
    }


def write_card(
    args: GOLDConfig,
    *,
    student: str,
    teacher: str,
    has_adapter: bool,
    weighting: str | None,  # of tokens
    num_rows: int | None,  # of the training data; None: a stream
    dataset: str | None,  # its name
    step: int,
    history: list[dict[str, Any]],
) -> Path | None:
    """README.md in output_dir; None where the user's own is there."""
    path = Path(args.output_dir or ".") / "README.md"
    if path.exists():
        before = path.read_text(encoding="utf-8")
        if MARK not in before and not any(word in before for word in OTHERS):
            return None
    is_id = student and not Path(student).exists()
    card_data = ModelCardData(
        base_model=student if is_id else None,
        library_name="peft" if has_adapter else "transformers",
        tags=["knowledge-distillation", "gold"],
    )
    rows = None if num_rows is None else f"{num_rows} rows"
    data = ", ".join(part for part in (dataset, rows) if part) or "unknown"
    loss = describe_loss(args)
    names = OF_TWO_TOKENIZERS if args.use_uld_loss else OF_ONE_TOKENIZER
    numbers = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    numbers |= as_dict(args.loss_kwargs)
    if weighting is not None:
        numbers = {**numbers, "token_weighting": weighting}
    parts = [
        f"---\n{card_data.to_yaml()}\n---",
        MARK,
        f"# {path.absolute().parent.name}",
        f"Distilled from `{teacher or 'unknown'}` into `{student or 'unknown'}` with gold-trainer.",
        _table("Training", {"steps": step, "data": data, "loss": loss, **numbers, **_fields(args)}),
        _table("Last values logged", _last(history)),
        _table(
            "Versions",
            {
                "gold-kernels": gold_kernels.__version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
            },
        ),
    ]
    ModelCard("\n\n".join(part for part in parts if part) + "\n").save(path)
    return path


def _fields(args: GOLDConfig) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SETTINGS}


def _last(history: list[dict[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for entry in history:
        values |= {name: entry[name] for name in METRICS if name in entry}
    return values


def _table(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = [f"| {name} | {_text(value)} |" for name, value in values.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *rows])


def _text(value: Any) -> str:
    value = value.value if isinstance(value, Enum) else value
    return f"{value:.4g}" if isinstance(value, float) else str(value)

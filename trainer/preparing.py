"""What is known of a run before weights are read: training and `gold-trainer check` begin here."""

from typing import Any, NamedTuple

from transformers import PreTrainedModel

from gold_trainer import loading, models, refusals
from gold_trainer.config import GOLDConfig
from gold_trainer.data.videos import takes_videos
from gold_trainer.objectives import Objective, choose_objective
from gold_trainer.rendering.collator import Processor
from gold_trainer.teachers.by_id import check_teachers
from gold_trainer.weighting.fields import refuse_text


class Prepared(NamedTuple):
    objective: type[Objective]
    student_processor: Processor
    teacher_processor: Processor
    is_text: bool
    row_options: dict[str, Any]  # of read_rows, for training
    eval_row_options: dict[str, Any]


def prepare(
    model: PreTrainedModel | str,
    teacher_model: PreTrainedModel | str | None,
    args: GOLDConfig,
    processor: Processor | None = None,
    teacher_processor: Processor | None = None,
) -> Prepared:
    """ValueError for a pair of models, or for fields, that do not fit."""
    objective = choose_objective(args)
    student_config, processor = loading.check_configs(
        model, teacher_model, args, processor, objective.check_pair
    )
    is_text = not models.is_vision_language(student_config)
    refusals.refuse_cut_pictures(args, is_text)
    refuse_text(args.token_weighting, is_text)
    if teacher_model is None:
        teacher_processor = processor
    else:
        teacher_processor = objective.teacher_processor(
            teacher_model, args, teacher_processor, processor
        )
    check_teachers(student_config, processor, teacher_processor, args, objective)
    options = {
        "is_text": is_text,
        "has_chat_template": processor.chat_template is not None,
        "ignore_columns": args.dataset_ignore_columns,
        "max_pixels": args.max_pixels,
        "picture_folder": args.picture_folder,
        "train_on": args.train_on,
        "takes_videos": takes_videos(processor),
        "teacher_ids": tuple(args.teacher_models or ()),
    }
    return Prepared(
        objective,
        processor,
        teacher_processor,
        is_text,
        options | {"needs_completion": not args.seq_kd and args.lmbda < 1},
        options | {"needs_completion": not args.seq_kd},
    )

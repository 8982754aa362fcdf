"""What must fit for one tokenizer and one processor to serve student and teacher."""

import logging
from collections.abc import Collection
from typing import Any

from transformers import PretrainedConfig, ProcessorMixin

from gold_trainer import models
from gold_trainer.rendering.collator import Processor
from gold_trainer.rendering.prompts import token_ids_of, tokenizer_of

# Heads of one tokenizer are padded to a multiple of 64 to 512 rows (Qwen2.5: 151936 and 152064),
# heads of two differ by thousands.
MAX_PADDING = 1024
# Config fields of the model and its vision tower that say what pixels and image tokens it takes.
PICTURE_FIELDS = (
    *("image_size", "patch_size", "temporal_patch_size", "spatial_merge_size", "scale_factor"),
    *("downsample_factor", "mm_tokens_per_image", "vision_feature_select_strategy"),
)
# Of a picture's processor: what the numbers of a pixel mean, and how pixels become patches.
PIXEL_FIELDS = (
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
    *("patch_size", "temporal_patch_size", "merge_size"),
)

logger = logging.getLogger(__name__)


def check_family(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    # Mixture-of-experts and dense models of a family share tokenizer and processor.
    families = [config.model_type.removesuffix("_moe") for config in (student, teacher)]
    if families[0] != families[1]:
        raise ValueError(
            "GOLDTrainer: student and teacher must be of one family, got "
            f"{student.model_type} and {teacher.model_type}; set use_uld_loss=True, the loss "
            "across families."
        )
    if models.is_vision_language(student):
        _check_pictures(student, teacher)


def _check_pictures(student: PretrainedConfig, teacher: PretrainedConfig) -> None:
    """One family's inputs serve both sides, but its models may cut pictures in their own ways."""
    for name in PICTURE_FIELDS:
        student_values, teacher_values = (
            [getattr(part, name, None) for part in (config, getattr(config, "vision_config", None))]
            for config in (student, teacher)
        )
        if student_values != teacher_values:
            raise ValueError(
                "GOLDTrainer: student and teacher must take the same pixels and image tokens, got "
                f"{name} {_given(student_values)} and {_given(teacher_values)}; set "
                "use_uld_loss=True, with which each side has its own processor."
            )


def _given(values: list[Any]) -> Any:
    return next((value for value in values if value is not None), None)


def shared_vocab_size(
    student: models.Head,
    teacher: models.Head,
    processor: Processor,
    placeholder_ids: Collection[int] = (),  # of pictures, in no completion
) -> int | None:
    """Entries that take part in the loss; None where both heads have the same number of rows.

    A placeholder may have a row of the embeddings alone, as in Llama 3.2 Vision.
    """
    v_student, v_teacher = student.out_features, teacher.out_features
    beyond = {i for i in placeholder_ids if i >= min(v_student, v_teacher)}
    num_entries = max(token_ids_of(processor) - beyond) + 1
    if num_entries > min(v_student, v_teacher) or abs(v_student - v_teacher) > MAX_PADDING:
        raise ValueError(
            "GOLDTrainer: student and teacher must have one tokenizer, got heads of "
            f"{v_student} and {v_teacher} rows and a tokenizer of {num_entries} entries; choose "
            "two models of one tokenizer, or set use_uld_loss=True, the loss across tokenizers."
        )
    return None if v_student == v_teacher else num_entries


def check_vocabularies(student: Processor, teacher: Processor | None) -> None:
    """The teacher's tokenizer, where it is known, must give every id the same token."""
    if teacher is None:
        return
    tokens = {token_id: token for token, token_id in tokenizer_of(student).get_vocab().items()}
    entries = tokenizer_of(teacher).get_vocab().items()
    differing = [(i, token) for token, i in entries if tokens.get(i, token) != token]
    if differing:
        token_id, token = min(differing)
        raise ValueError(
            "GOLDTrainer: student and teacher must have one vocabulary, got token "
            f"{token_id} = {tokens[token_id]!r} and {token!r} ({len(differing)} entries differ); "
            "set use_uld_loss=True, the loss across tokenizers."
        )


def check_pixels(student: Processor, teacher: Any) -> None:
    """teacher: its processor of pictures, or None where none is known. What it would make of a
    picture has to be what the student's makes, which both get; the sizes are the student's.
    """
    if teacher is None or not isinstance(student, ProcessorMixin):
        return
    own = getattr(student, "image_processor", None)
    for name in PIXEL_FIELDS:
        values = [getattr(side, name, None) for side in (own, teacher)]
        values = [list(v) if isinstance(v, list | tuple) else v for v in values]
        if None not in values and values[0] != values[1]:
            raise ValueError(
                "GOLDTrainer: the processors of student and teacher must make the same pixels of a "
                f"picture, got {name} {values[0]} and {values[1]}; set use_uld_loss=True, with "
                "which each side has its own processor, or save one processor with both."
            )


def warn_of_template(student: Processor, teacher: Processor) -> None:
    theirs = teacher.chat_template or tokenizer_of(teacher).chat_template
    if theirs is not None and theirs != student.chat_template:
        logger.warning(
            "GOLDTrainer: the teacher's chat template is not the student's, which both are "
            "prompted with; save one template with both, or set use_uld_loss=True, with which each "
            "side has its own."
        )

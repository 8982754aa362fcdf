"""What must fit for one tokenizer and one processor to serve student and teacher."""

from collections.abc import Collection
from typing import Any

from transformers import PretrainedConfig

from gold_trainer import models
from gold_trainer.collator import Processor, token_ids_of, tokenizer_of

# Heads of one tokenizer are padded to a multiple of 64 to 512 rows (Qwen2.5: 151936 and 152064),
# heads of two differ by thousands.
MAX_PADDING = 1024
# Config fields of the model and its vision tower that say what pixels and image tokens it takes.
PICTURE_FIELDS = (
    *("image_size", "patch_size", "temporal_patch_size", "spatial_merge_size", "scale_factor"),
    *("downsample_factor", "mm_tokens_per_image", "vision_feature_select_strategy"),
)


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

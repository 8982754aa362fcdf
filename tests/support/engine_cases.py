"""What the runs of engine_step are: a student, a loss, rows, and what is done with them."""

from typing import Any

import peft

ULD = {"use_uld_loss": True, "uld_use_hybrid_loss": True, "uld_crossentropy_weight": 0.5}
# in the first three micro-batches ranks differ in whether they have pictures, videos, or both
MEDIA = {"family": "qwen3_vl", "images": "mixed", "has_videos": True}
MIXED = {"family": "qwen3_vl", "images": "mixed"}  # ranks differ in whether they have a picture


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options
    )


# family of the student, is_tied, images, teacher_family or has_teacher, and fields of GOLDConfig
CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"is_tied": False},
    "bf16": {"is_tied": False, "bf16": True},
    "bf16_own_teacher": {"peft_config": lora(), "has_teacher": False, "bf16": True},
    "frozen_head": {"is_tied": False, "is_head_frozen": True},
    "lora": {"peft_config": lora()},
    "compiled": {"is_tied": False, "compile_models": "regional", "gradient_checkpointing": True},
    "saved_head": {"is_tied": False, "peft_config": lora(modules_to_save=["lm_head"])},
    "saved_tied_head": {"peft_config": lora(modules_to_save=["lm_head"])},
    "own_teacher": {"peft_config": lora(), "has_teacher": False},
    "own_top_k": {"peft_config": lora(), "has_teacher": False, "loss_top_k": 8},
    "mixed_pictures": MIXED,
    "mixed_media": MEDIA,
    "uld": {"is_tied": False, "teacher_family": "llama", **ULD},
    "uld_pictures": {**MIXED, "teacher_family": "idefics3", **ULD},
    "evaluated_first": {"eval_on_start": True},
    "early_evaluation": {"evaluates_early": True},
    "on_policy": {"lmbda": 1.0},
    # samples would differ: a rank that has a row more draws more numbers
    "on_policy_pictures": {**MIXED, "lmbda": 1.0, "top_k": 1},
    "on_policy_media": {**MEDIA, "lmbda": 1.0, "top_k": 1},
    # whose teacher is in parts too, and writes; of the first rank's rows one has an answer
    "seq_kd_media": {
        **MEDIA,
        **{"peft_config": lora(), "has_teacher": False, "seq_kd": True, "top_k": 1},
        "is_partly_answered": True,
    },
    "on_policy_lora": {"peft_config": lora(), "lmbda": 1.0},
    # the ranks' prompts leave 4 and 9 tokens
    "on_policy_rooms": {"lmbda": 1.0, "max_length": 30},
    # the first rank's prompts have two lengths, the second's one
    "on_policy_lengths": {"lmbda": 1.0, "writes_by_length": True},
    # The epoch ends within a window, a prompt's completions are split between ranks there; the last
    # rows of evaluation are as few as one.
    "uneven": {
        **{"num_rows": 5, "num_eval_rows": 3, "num_generations": 2, "lmbda": 0.5},
        **{"max_steps": -1, "num_train_epochs": 1, "images": "mixed", "family": "qwen3_vl"},
    },
    "seq_kd": {"seq_kd": True},
    "by_name": {"family": "qwen3_vl", "images": 1, "lmbda": 0.5, "is_by_name": True},
    # both rows of a micro-batch are completions of one prompt, on each of two ranks
    "shared_prompts": {
        **{"family": "qwen3_vl", "images": 1, "lmbda": 1.0, "top_k": 1, "num_generations": 2},
        **{"share_prompts": True, "per_device_train_batch_size": 2},
        "gradient_accumulation_steps": 1,
    },
    # of the same teacher, which is not there: ranks differ in whether they have a picture
    "cached": {**MIXED, "is_by_name": True, "teacher_cache": "hidden"},
    "cached_means": {
        **{**MIXED, "is_by_name": True, "teacher_cache": "head_means"},
        **{"beta": 0.0, "peft_config": lora()},
    },
    # compiling the step of torchao's optimizers takes minutes on a CPU
    "adamw_8bit": {"optim": "adamw_torch_8bit", "learning_rate": 1e-2, "is_compiled": False},
    "resumed": {
        "is_resumed": True,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 1,
    },
}

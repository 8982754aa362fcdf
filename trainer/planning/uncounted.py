"""Fields that change the memory of a run and are no part of its plan: those set are named."""

from collections.abc import Iterator

from gold_trainer.config import GOLDConfig
from gold_trainer.planning.memory import Setup, is_vllm_here

# Where they have not their defaults.
FIELDS = {
    "teacher_batch_size": "the rows of a micro-batch are counted",
    "neftune_noise_alpha": "a copy of the embeddings",
    "optim_target_modules": "an optimizer of a low rank is counted as one of all weights",
    "auto_find_batch_size": "the run may take smaller batches",
    "rollout_compile": "what the compiler itself takes",
    "loss_backend": "buffers are those of triton's kernels",
    "token_weighting": "log-probabilities of tokens, and picture_detail's second look of the "
    "teacher",
    "fsdp": "--engine says the engine",
    "fsdp_config": "weights are counted on the GPU, in layers",
    "deepspeed": "--engine says the engine, with its defaults",
}
VLLM_SHARE = "a share of a GPU: without --gpu_memory the engine's weights alone are counted"
EVALUATION = "an evaluation has more rows than a step"
CHECKPOINTING = "activations are counted on the GPU, the input of every layer"


def uncounted(args: GOLDConfig, setup: Setup) -> list[str]:
    return [
        f"not counted: {field}={getattr(args, field)!r}, {why}"
        for field, why in _uncounted(args, setup)
    ]


def _uncounted(args: GOLDConfig, setup: Setup) -> Iterator[tuple[str, str]]:
    if is_vllm_here(args) and setup.gpu_bytes is None:
        yield "vllm_gpu_memory_utilization", VLLM_SHARE
    is_larger = args.per_device_eval_batch_size > args.per_device_train_batch_size
    if args.eval_strategy != "no" and is_larger:
        yield "per_device_eval_batch_size", EVALUATION
    if set(args.gradient_checkpointing_kwargs or {}) - {"use_reentrant"}:
        yield "gradient_checkpointing_kwargs", CHECKPOINTING
    for field, why in FIELDS.items():
        default = GOLDConfig.__dataclass_fields__[field].default
        if getattr(args, field) not in (default, None, False, "", {}, []):
            yield field, why

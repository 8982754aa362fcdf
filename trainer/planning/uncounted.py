"""Fields that change the memory of a run and are no part of its plan: those set are named."""

from collections.abc import Callable
from typing import Any, NamedTuple

from gold_trainer.config import GOLDConfig
from gold_trainer.planning.memory import Setup


class Uncounted(NamedTuple):
    field: str
    is_set: Callable[[GOLDConfig, Setup], bool]
    why: str


def _given(field: str) -> Callable[[GOLDConfig, Setup], bool]:
    """Anything but what it is by default, and nothing."""

    def is_set(args: GOLDConfig, _setup: Setup) -> bool:
        default = GOLDConfig.__dataclass_fields__[field].default
        return getattr(args, field) not in (default, None, False, "", {}, [])

    return is_set


def _checkpoints_otherwise(args: GOLDConfig, _setup: Setup) -> bool:
    return bool(set(args.gradient_checkpointing_kwargs or {}) - {"use_reentrant"})


def _evaluates_more(args: Any, _setup: Setup) -> bool:
    is_larger = args.per_device_eval_batch_size > args.per_device_train_batch_size
    return args.eval_strategy != "no" and is_larger


def _vllm_without_gpu(args: GOLDConfig, setup: Setup) -> bool:
    return is_vllm_here(args) and setup.gpu_bytes is None


def is_vllm_here(args: GOLDConfig) -> bool:
    return args.use_vllm and args.vllm_mode == "colocate"


FIELDS = (
    Uncounted(
        "vllm_gpu_memory_utilization",
        _vllm_without_gpu,
        "a share of a GPU: without --gpu_memory the engine's weights alone are counted",
    ),
    Uncounted(
        "per_device_eval_batch_size", _evaluates_more, "an evaluation has more rows than a step"
    ),
    Uncounted(
        "gradient_checkpointing_kwargs",
        _checkpoints_otherwise,
        "activations are counted on the GPU, the input of every layer",
    ),
    Uncounted(
        "teacher_batch_size", _given("teacher_batch_size"), "the rows of a micro-batch are counted"
    ),
    Uncounted("neftune_noise_alpha", _given("neftune_noise_alpha"), "a copy of the embeddings"),
    Uncounted(
        "optim_target_modules",
        _given("optim_target_modules"),
        "an optimizer of a low rank is counted as one of all weights",
    ),
    Uncounted(
        "auto_find_batch_size", _given("auto_find_batch_size"), "the run may take smaller batches"
    ),
    Uncounted("rollout_compile", _given("rollout_compile"), "what the compiler itself takes"),
    Uncounted("loss_backend", _given("loss_backend"), "buffers are those of triton's kernels"),
    Uncounted(
        "token_weighting",
        _given("token_weighting"),
        "log-probabilities of tokens, and picture_detail's second look of the teacher",
    ),
    Uncounted("fsdp", _given("fsdp"), "--engine says the engine"),
    Uncounted("fsdp_config", _given("fsdp_config"), "weights are counted on the GPU, in layers"),
    Uncounted("deepspeed", _given("deepspeed"), "--engine says the engine, with its defaults"),
)


def uncounted(args: GOLDConfig, setup: Setup) -> list[str]:
    return [
        f"not counted: {field}={getattr(args, field)!r}, {why}"
        for field, is_set, why in FIELDS
        if is_set(args, setup)
    ]

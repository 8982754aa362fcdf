"""Names that reach a library in a dict, or as text: looked at before models are loaded."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers.generation import logits_process
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import SchedulerType

from gold_trainer.config import GOLDConfig
from gold_trainer.data.row_errors import told
from gold_trainer.fields.optimizers import check_optimizer
from gold_trainer.nearest import did_you_mean
from gold_trainer.quantised import NAME, read_quantization

OF_TEXT = ("revision", "code_revision", "variant", "subfolder")  # of from_pretrained
SET_BY_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
CHECKPOINTING = (
    *("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug"),
    *("early_stop", "every_n_layers", "offload"),
)
# Those of GenerationConfig that change the scores of a token before one is drawn.
OF_GENERATE = (
    *("min_length", "min_new_tokens", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    *("exponential_decay_length_penalty", "begin_suppress_tokens", "forced_eos_token_id"),
    *("encoder_repetition_penalty", "remove_invalid_values"),
)
# Kinds of those whose value generate() looks at in the first rollout alone.
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size"), (int,)),
    **dict.fromkeys(("bad_words_ids", "begin_suppress_tokens"), (list, tuple)),
    "exponential_decay_length_penalty": (list, tuple),
    "sequence_bias": (list, dict),
    "forced_eos_token_id": (int, list),
    "encoder_repetition_penalty": (int, float),
    "remove_invalid_values": (bool,),
}
NO_PROMPT: Any = torch.zeros(1, 1, dtype=torch.int64)
# What generate() makes of those in a rollout; it looks at values then. 0 stands for an end token.
MADE: dict[str, Callable[[Any], Any]] = {
    "min_length": lambda value: logits_process.MinLengthLogitsProcessor(value, 0),
    "min_new_tokens": lambda value: logits_process.MinNewTokensLengthLogitsProcessor(1, value, 0),
    "no_repeat_ngram_size": lambda value: (
        value == 0 or logits_process.NoRepeatNGramLogitsProcessor(value)
    ),
    "bad_words_ids": lambda value: logits_process.NoBadWordsLogitsProcessor(value, 0),
    "sequence_bias": logits_process.SequenceBiasLogitsProcessor,
    "exponential_decay_length_penalty": lambda value: logits_process.ExponentialDecayLengthPenalty(
        value, 0, 1
    ),
    "begin_suppress_tokens": lambda value: logits_process.SuppressTokensAtBeginLogitsProcessor(
        value, 1
    ),
    "forced_eos_token_id": lambda value: logits_process.ForcedEOSTokenLogitsProcessor(9, value),
    "encoder_repetition_penalty": lambda value: (
        logits_process.EncoderRepetitionPenaltyLogitsProcessor(value, NO_PROMPT)
    ),
}
# Those of vLLM's SamplingParams that do so, in a server and in an engine here.
OF_VLLM = (
    *("min_tokens", "presence_penalty", "frequency_penalty", "bad_words", "allowed_token_ids"),
    *("thinking_token_budget", "extra_args"),
)
OF_VLLM_SERVER = (*OF_VLLM, "structured_outputs", "repetition_detection")  # objects in an engine
# What an evaluation says beside the means of the objective.
BESIDE = ("completion_length", "runtime", "samples_per_second", "steps_per_second")


def check_library_options(args: GOLDConfig) -> None:
    check_optimizer(args)
    schedule: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(args.lr_scheduler_type)]
    parameters = inspect.signature(schedule).parameters
    if args.warmup_steps and "num_warmup_steps" not in parameters:
        name = SchedulerType(args.lr_scheduler_type).value
        instead = ", or lr_scheduler_type='constant_with_warmup'" if name == "constant" else ""
        raise ValueError(
            f"GOLDTrainer: warmup_steps must be 0 with lr_scheduler_type={name!r}, which has no "
            f"warm-up, got {args.warmup_steps:g}; set 0{instead}."
        )
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_any:
        known = [name for name in parameters if name not in SET_BY_TRAINER]
        owner = f"the schedule {SchedulerType(args.lr_scheduler_type).value!r}"
        _check("lr_scheduler_kwargs", args.lr_scheduler_kwargs, known, owner)
        _try_schedule(args)
    for field in ("model_init_kwargs", "teacher_model_init_kwargs"):
        given = getattr(args, field)
        if isinstance(given, dict):
            _refuse_numbers(field, given)
            setattr(args, field, _with_dtype(field, given))
        if isinstance(given, dict) and NAME in given:
            read_quantization(field, given[NAME])
    _check_generation(args)
    name = "gradient_checkpointing_kwargs"
    _check(name, getattr(args, name), CHECKPOINTING, "torch.utils.checkpoint.checkpoint")


def _try_schedule(args: GOLDConfig) -> None:
    """Make a schedule on a weight of its own: what it needs and is not given shows before models
    load.
    """
    optimizer = torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=args.learning_rate)
    num_steps = args.max_steps if args.max_steps > 0 else 10**6
    kwargs: dict[str, Any] = dict(args.lr_scheduler_kwargs or {})  # type: ignore[arg-type]
    try:
        get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=kwargs,
        )
    except Exception as error:  # whatever values of another kind lead it to
        name = SchedulerType(args.lr_scheduler_type).value
        raise ValueError(
            f"GOLDTrainer: lr_scheduler_kwargs must be what the schedule {name!r} takes, got "
            f"{kwargs} ({told(error)}); set what it names, or another lr_scheduler_type."
        ) from error


def _refuse_numbers(field: str, given: dict[str, Any]) -> None:
    """ValueError for the revision 1.10 without quotes, which is the number 1.1."""
    for name in OF_TEXT:
        value = given.get(name)
        if not isinstance(value, str | None):
            raise ValueError(
                f"GOLDTrainer: {field} must have text as {name}, got {value!r}; put it in quotes."
            )


def _with_dtype(field: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options with torch's name of a dtype; torch.bfloat16 is read as bfloat16."""
    for key in ("dtype", "torch_dtype"):
        value = given.get(key)
        if not isinstance(value, str) or value == "auto":
            continue
        name = value.removeprefix("torch.")
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(
                f"GOLDTrainer: {field} must have auto, float32, bfloat16 or float16 as {key}, got "
                f"{value!r}{did_you_mean(value, ('float32', 'bfloat16', 'float16'), 0.3) or '.'}"
            )
        given = {**given, key: name}
    return given


def _check_generation(args: GOLDConfig) -> None:
    """A server drops names that it does not know, without a word."""
    kwargs = args.generation_kwargs
    known: tuple[str, ...] = OF_GENERATE
    owner = "generate()"
    if args.use_vllm:
        known = OF_VLLM if args.vllm_mode == "colocate" else OF_VLLM_SERVER
        owner = "vLLM's SamplingParams"
    _check("generation_kwargs", kwargs, known, f"{owner} beside those with a field")
    for name, value in (kwargs if isinstance(kwargs, dict) else {}).items():
        kinds = KINDS.get(name, (object,))
        if not isinstance(value, kinds) or (isinstance(value, bool) and int in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"GOLDTrainer: generation_kwargs must have a value of {names} for {name}, got "
                f"{value!r}; mend it."
            )
        try:
            MADE.get(name, type)(value)
        except Exception as error:  # whatever values lead it to
            raise ValueError(
                f"GOLDTrainer: generation_kwargs must have a value that generate() takes for "
                f"{name}, got {value!r} ({told(error)}); mend it."
            ) from error
        is_longer = isinstance(value, int) and value > args.max_completion_length
        if name == "min_new_tokens" and is_longer:
            raise ValueError(
                "GOLDTrainer: generation_kwargs must have at most max_completion_length="
                f"{args.max_completion_length} for {name}, got {value}; raise the one or lower "
                "the other."
            )
    if args.use_vllm and args.seq_kd and kwargs:
        raise ValueError(
            "GOLDTrainer: generation_kwargs must be left out with use_vllm and seq_kd, got "
            f"{kwargs}, which the teacher's generate() does not know; set seq_kd=False, or "
            "use_vllm=False and arguments of generate()."
        )


def check_best_metric(args: GOLDConfig, names: Collection[str], eval_dataset: Any) -> None:
    """names: of the objective's means. The first evaluation would end in a KeyError."""
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no":
        return
    parts = list(eval_dataset) if isinstance(eval_dataset, dict) else []
    known = [*names, *BESIDE]
    if parts:  # none of all together
        known = [f"{part}_{name}" for part in parts for name in known]
    if metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"GOLDTrainer: metric_for_best_model must be one of {', '.join(known)}, got "
            f"{metric!r}{did_you_mean(metric.removeprefix('eval_'), known) or '; choose one.'}"
        )


def _check(field: str, given: Any, known: Collection[str], owner: str) -> None:
    for name in given if isinstance(given, dict) else ():
        if name not in known:
            raise ValueError(
                f"GOLDTrainer: {field} must hold arguments of {owner}, got {name!r}; they are "
                f"{', '.join(known) or 'none'}{did_you_mean(name, known) or '.'}"
            )

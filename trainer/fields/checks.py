"""Kind and range of every field, checked in one place before anything reads them.

Kinds come from the annotations, choices from the metadata, ranges and remedies from the tables here
(metadata goes to argparse, which knows choices and no ranges).
"""

import dataclasses
import math
import os
import reprlib
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, NamedTuple

from gold_trainer.data.json_text import parsed_json
from gold_trainer.nearest import nearest


class Range(NamedTuple):
    text: str  # completes "must be"
    low: float
    high: float = math.inf
    is_open: bool = False  # low itself is out

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.is_open and value == self.low)


SHARE = Range("in [0, 1]", 0, 1)
POSITIVE = Range("positive and finite", 0, is_open=True)
NOT_NEGATIVE = Range("finite and not negative", 0)
AT_LEAST_1 = Range("at least 1", 1)
SEED = Range("in [0, 4294967295]", 0, 2**32 - 1)
WIDEST = Range("a number of 64 bits", -(2**63), 2**63 - 1)

AS_THEY_ARE = "1.0 leaves the logits as they are"
LEFT_OUT = "0 leaves the part out"
RAISE = "raise it"
RANGES: dict[str, tuple[Range, str]] = {
    # the loss
    "beta": (SHARE, "0 is forward KL, 1 reverse KL"),
    "loss_top_k": (Range("at least 0", 0), "0 compares all tokens"),
    "loss_temperature": (POSITIVE, AS_THEY_ARE),
    "loss_teacher_temperature": (POSITIVE, AS_THEY_ARE),
    "distillation_weight": (NOT_NEGATIVE, LEFT_OUT),
    "crossentropy_weight": (NOT_NEGATIVE, LEFT_OUT),
    "chunk_size": (AT_LEAST_1, "None chooses it"),
    "loss_budget_mib": (Range("finite and at least 0.001", 0.001), "None is 1024 MiB"),
    # two tokenizers
    "uld_student_temperature": (POSITIVE, AS_THEY_ARE),
    "uld_teacher_temperature": (POSITIVE, AS_THEY_ARE),
    "uld_group_temperature": (POSITIVE, "1.0 compares the likelihoods themselves"),
    "uld_crossentropy_weight": (NOT_NEGATIVE, LEFT_OUT),
    "uld_distillation_weight": (NOT_NEGATIVE, LEFT_OUT),
    "uld_hybrid_matched_weight": (NOT_NEGATIVE, LEFT_OUT),
    "uld_hybrid_unmatched_weight": (NOT_NEGATIVE, LEFT_OUT),
    # completions and rows
    "lmbda": (SHARE, "0 is off-policy, 1 on-policy"),
    "temperature": (POSITIVE, AS_THEY_ARE),
    "top_p": (Range("in (0, 1]", 0, 1, is_open=True), "1.0 turns it off"),
    "top_k": (Range("at least 0", 0), "0 turns it off"),
    "min_p": (SHARE, "None turns it off"),
    "repetition_penalty": (POSITIVE, "1.0 turns it off"),
    "rollout_cache_gib": (POSITIVE, "None takes half of what is free"),
    "max_completion_length": (AT_LEAST_1, RAISE),
    "max_length": (Range("at least 2", 2), "None sets no limit"),
    "num_generations": (AT_LEAST_1, "1 is one completion of a prompt"),
    "generation_batch_size": (AT_LEAST_1, "None computes it"),
    "log_completions_steps": (AT_LEAST_1, RAISE),
    "num_completions_to_print": (AT_LEAST_1, "None prints all"),
    "max_pixels": (AT_LEAST_1, "None leaves PIL's own limit"),
    # vLLM
    "vllm_server_port": (Range("in [1, 65535]", 1, 65535), "8001 is the default"),
    "vllm_group_port": (Range("in [1, 65535]", 1, 65535), "51216 is the default"),
    "vllm_server_timeout": (NOT_NEGATIVE, "240 seconds is the default"),
    "vllm_request_timeout": (POSITIVE, "600 seconds is the default"),
    "vllm_sync_frequency": (AT_LEAST_1, "1 brings weights over at every step"),
    "async_rollouts": (Range("0 or 1", 0, 1), "0 writes each window with the newest weights"),
    "vllm_max_model_length": (Range("at least 2", 2), "None takes max_length"),
    "vllm_tensor_parallel_size": (AT_LEAST_1, "1 is one GPU"),
    "vllm_gpu_memory_utilization": (
        Range("in (0, 1]", 0, 1, is_open=True),
        "None takes 0.9, in colocate 0.3",
    ),
    "teacher_batch_size": (AT_LEAST_1, "None takes the rows of a micro-batch"),
    # a served teacher
    "teacher_server_timeout": (NOT_NEGATIVE, "240 seconds is the default"),
    "teacher_request_timeout": (POSITIVE, "600 seconds is the default"),
    "teacher_request_retries": (Range("at least 0", 0), "0 asks once"),
    # the adapter
    "lora_r": (AT_LEAST_1, "16 is usual"),
    "lora_alpha": (POSITIVE, "twice lora_r is usual"),
    "lora_dropout": (Range("in [0, 1)", 0, math.nextafter(1, 0)), "0 turns it off"),
    # of transformers
    "learning_rate": (NOT_NEGATIVE, "1e-5 is usual for all weights, 1e-4 for an adapter"),
    "num_train_epochs": (POSITIVE, "or set max_steps"),
    "max_steps": (Range("at least 1, or -1", -1), "-1 leaves it to num_train_epochs"),
    "per_device_train_batch_size": (AT_LEAST_1, RAISE),
    "per_device_eval_batch_size": (AT_LEAST_1, RAISE),
    "gradient_accumulation_steps": (AT_LEAST_1, "1 takes a step after every micro-batch"),
    "warmup_steps": (NOT_NEGATIVE, "0 is no warm-up"),
    "weight_decay": (NOT_NEGATIVE, "0 turns it off"),
    "max_grad_norm": (NOT_NEGATIVE, "0 turns clipping off"),
    "adam_beta1": (Range("in [0, 1)", 0, math.nextafter(1, 0)), "0.9 is usual"),
    "adam_beta2": (Range("in [0, 1)", 0, math.nextafter(1, 0)), "0.999 is usual"),
    "adam_epsilon": (NOT_NEGATIVE, "1e-8 is usual"),
    "neftune_noise_alpha": (NOT_NEGATIVE, "None adds no noise"),
    "logging_steps": (POSITIVE, "1 logs every step"),
    "save_steps": (POSITIVE, "save_strategy='no' saves nothing"),
    "eval_steps": (POSITIVE, "eval_strategy='no' turns evaluation off"),
    "eval_delay": (NOT_NEGATIVE, "0 is no delay"),
    "save_total_limit": (AT_LEAST_1, "None keeps all checkpoints"),
    "dataloader_num_workers": (Range("at least 0", 0), "0 reads in the main process"),
    "dataloader_prefetch_factor": (AT_LEAST_1, "None leaves it to torch"),
    "eval_accumulation_steps": (AT_LEAST_1, "leave it out"),
    "torch_empty_cache_steps": (AT_LEAST_1, "leave it out"),
    "ddp_timeout": (AT_LEAST_1, "1800 seconds is usual"),
    "ddp_bucket_cap_mb": (AT_LEAST_1, "None leaves it to torch"),
    "seed": (SEED, "42 is the default"),
    "data_seed": (SEED, "None takes seed"),
}
OPTIONS = "a dict of from_pretrained's arguments", 'write {"dtype": "bfloat16"}'
TEXTS: dict[str, tuple[str, str]] = {
    "loss_kwargs": ("a dict of numbers", 'write {"alpha": 0.2}'),
    "token_weighting_kwargs": ("a dict of numbers", 'write {"high_weight": 0.7}'),
    "model_init_kwargs": OPTIONS,
    "teacher_model_init_kwargs": OPTIONS,
    "teacher_models": ("a dict of models by id", 'write {"math": "PATH", "code": "PATH"}'),
    "chat_template_kwargs": (
        "a dict of arguments of the chat template",
        'write {"enable_thinking": false}',
    ),
    "stop_strings": ("a list of texts", r"write ['\n\n']"),
    "generation_kwargs": (
        "a dict of arguments of who writes completions",
        'write {"no_repeat_ngram_size": 4}, with use_vllm {"min_tokens": 4}',
    ),
    "dataset_ignore_columns": ("a list of names", "write ['id']"),
    "optim_args": ("None or text", "write 'momentum=0.9,nesterov=true'"),
    "logits_dtype": ("", "'float32' is the precise one"),
    "loss_backend": ("", "None takes the one that fits the device"),
    "uld_token_merge_strategy": ("", "'bayesian' is the chain rule"),
    "uld_loss_type": ("", "'uld' is the default"),
}
KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    list: "a list of names",
    dict: "a dict",
}
MORE_KINDS = ("fsdp",)  # than its annotation has: True too
FILES = ("accelerator_config", "deepspeed", "fsdp_config")  # or the JSON, or a dict
OF_NAMES = ("teacher_models",)  # dicts of texts, of any text


def check_fields(config: Any, owner: str) -> None:
    """ValueError for the first field whose value is of another kind, or out of its range. Whole
    numbers that came as 8.0, and paths, get the kind that the field has.
    """
    config_type: Any = type(config)
    for field in dataclasses.fields(config):
        kinds, is_known = kinds_of(config_type)[field.name]
        given = getattr(config, field.name)
        if given is field.default:
            continue
        value = _as_kind(given, kinds) if is_known else given
        is_fine = _is_dict_if_text(field, value, kinds)
        if is_known:
            is_fine &= _is_kind(value, kinds) and _is_in_range(field, kinds, value)
        elif dict in _bases(kinds):  # or an object that holds the same
            is_fine &= not isinstance(value, bool | Real | complex | list | tuple | bytes)
        if not is_fine:
            must_be, remedy = _words(field, kinds, value)
            raise ValueError(
                f"{owner}: {field.name} must be {must_be}, got {reprlib.repr(value)}; {remedy}."
            )
        if dict in _bases(kinds) and field.name not in (*FILES, *OF_NAMES):
            refuse_quoted(dict_of_text(value), f"{owner}: {field.name}")
        if value is not given:
            setattr(config, field.name, value)


def refuse_quoted(value: Any, where: str) -> None:
    """ValueError for "false" in a dict, at any depth: a text that is not empty counts as true."""
    for key, part in value.items() if isinstance(value, Mapping) else ():
        if isinstance(part, str) and part.strip().lower() in ("true", "false"):
            raise ValueError(
                f"{where} must have true or false without quotes for {key}, got the text {part!r}, "
                "which counts as true; leave the quotes out."
            )
        refuse_quoted(part, where)


def as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """The value of a field that a command line has as JSON."""
    assert not isinstance(value, str), "GOLDConfig has read the JSON"
    return value or {}


def refuse_given(
    config: Any, names: Iterable[str], must_be: str, remedy: str, owner: str = "GOLDConfig"
) -> None:
    """ValueError for the first of these fields that has not its default, as it must here."""
    for name in names:
        value = getattr(config, name)
        if value != config.__dataclass_fields__[name].default:
            raise ValueError(f"{owner}: {name} must be {must_be}, got {value!r}{remedy}.")


@cache
def kinds_of(config_type: type) -> dict[str, tuple[tuple[Any, ...], bool]]:
    """The kinds of each field, and whether they are all that it takes: so it is of ours, and of
    those of transformers that hold one value.
    """
    own = {
        name
        for parent in config_type.__mro__
        if parent.__module__.startswith("gold_trainer")
        for name in vars(parent).get("__annotations__", {})
    }
    kinds = {}
    for name, hint in typing.get_type_hints(config_type).items():
        is_union = typing.get_origin(hint) in (typing.Union, UnionType)
        these = typing.get_args(hint) if is_union else (hint,)
        is_known = name in own or (all(map(_is_simple, these)) and name not in MORE_KINDS)
        kinds[name] = these, is_known
    return kinds


def _is_simple(kind: Any) -> bool:
    return kind in (bool, int, float, str, NoneType, list[str]) or _is_enum(kind)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _number(value: Any) -> int | float | None:
    """None for what is no number, as True is none; numbers of numpy are."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def _as_kind(value: Any, kinds: tuple[Any, ...]) -> Any:
    if isinstance(value, os.PathLike) and str in kinds:
        return os.fspath(value)
    number = _number(value)
    if number is None or type(value) in kinds:
        return value
    if int in kinds and math.isfinite(number) and number == int(number):
        return int(number)
    return number


def _is_kind(value: Any, kinds: tuple[Any, ...]) -> bool:
    number = _number(value)
    if isinstance(value, bool):
        return bool in kinds
    if number is not None:
        is_kind = float in kinds or (int in kinds and isinstance(number, int))
        return is_kind and math.isfinite(number)
    if isinstance(value, str) and any(map(_is_enum, kinds)):
        return value in _choices(kinds)
    if isinstance(value, list | tuple):
        return list in _bases(kinds) and all(isinstance(part, str) for part in value)
    choices = _choices(kinds)
    return (bool(choices) and value in choices) or isinstance(value, tuple(_bases(kinds)))


def _bases(kinds: tuple[Any, ...]) -> set[type]:
    """list of list[str], dict of dict[str, Any]; a Literal has none."""
    bases = {typing.get_origin(kind) or kind for kind in kinds}
    return {base for base in bases if isinstance(base, type)}


def _choices(kinds: tuple[Any, ...]) -> list[Any]:
    literals = [
        c for k in kinds if typing.get_origin(k) is typing.Literal for c in typing.get_args(k)
    ]
    return literals + [member.value for kind in kinds if _is_enum(kind) for member in kind]


def _is_dict_if_text(field: dataclasses.Field, value: Any, kinds: tuple[Any, ...]) -> bool:
    """A dict may come as JSON, as a command line has it."""
    if not isinstance(value, str) or dict not in _bases(kinds):
        return True
    if field.name in FILES and not value.lstrip().startswith("{"):
        return os.path.isfile(value)
    return isinstance(dict_of_text(value), dict)


def dict_of_text(value: Any) -> Any:
    """The dict whose JSON a text is; anything else is as it is."""
    read = parsed_json(value)
    return read if isinstance(read, dict) else value


def _is_in_range(field: dataclasses.Field, kinds: tuple[Any, ...], value: Any) -> bool:
    if isinstance(value, str):
        choices = field.metadata.get("choices")
        return choices is None or value in choices
    number = _number(value)
    if number is None:
        return True
    if field.name == "max_steps" and number == 0:
        return False
    range_, _ = RANGES.get(field.name, (WIDEST, ""))
    return range_.holds(number) and (int not in kinds or WIDEST.holds(number))


def _words(field: dataclasses.Field, kinds: tuple[Any, ...], value: Any) -> tuple[str, str]:
    """What is expected, and what to do."""
    choices = list(field.metadata.get("choices") or ()) or _choices(kinds)
    options = ["None"] if NoneType in kinds else []
    text, remedy = TEXTS.get(field.name, ("", ""))
    if field.name in RANGES:
        text, remedy = RANGES[field.name][0].text, RANGES[field.name][1]
        number = _number(value)
        if int in kinds and not isinstance(number, int):
            text = f"a whole number, {text}"
        elif number is None:
            text = f"a number, {text}"
        options.append(text)
    elif choices:
        meant = nearest(value, choices)
        remedy = f"did you mean {meant!r}?" if meant and not remedy else remedy
        options += map(repr, choices)
    elif text:
        options = [text]
    else:
        bases = _bases(kinds)
        bases -= {str} if dict in bases else set()
        options += [words for base, words in KINDS.items() if base in bases]
        options += ["the path of its JSON"] if field.name in FILES else []
    if not remedy:
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        remedy = f"the default is {getattr(default, 'value', default)!r}"
    return " or ".join([", ".join(options[:-1]), options[-1]][not options[:-1] :]), remedy

"""What a model would ask the device for, answered on the host.

Ids, masks and sizes of pictures are made on the host. A model that reads them back (.tolist(),
.item(), a boolean index) waits until the device has done all it was given, and the device then
waits for what comes next. So integers remember where they came from, and what is computed from them
alone, positions of tokens and of patches, is computed there.

B sequences, L positions.
"""

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import TrainingArguments

from gold_trainer.speed.replacing import Replacement, replaced

FUNCTIONS = "transformers.vision_utils"  # of sizes of pictures alone
INDEX = "get_rope_index"  # of a model, from ids, masks and sizes of pictures
# Attributes of tensors:
HOST = "gold_trainer_on_host"  # of one on a device, where it is copied from
GOES_TO = "gold_trainer_goes_to"  # of one on the host, the device on which it is asked for
POSITIONS = "gold_trainer_positions"  # of ids on the host, what models have made of them
NUM_ANSWERS = 64  # that are kept: student and teacher ask alike, and sizes of pictures come again


class Copied(NamedTuple):
    source: Tensor  # on the host
    version: int  # of the tensor on the device, which counts its changes in place


def pinned(tensor: Tensor, args: TrainingArguments) -> Tensor:
    """The tensor in memory from which the device copies without anybody waiting for it, if
    wanted.
    """
    is_wanted = args.dataloader_pin_memory and args.device.type == "cuda"
    return tensor.pin_memory() if is_wanted else tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; integers remember the one that they are copied from."""
    if device.type == "cpu":
        return tensor
    result = tensor.to(device, non_blocking=True)
    if not tensor.is_floating_point() and not result.is_inference():  # such have no version
        setattr(result, HOST, Copied(tensor, result._version))
    return result


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without anybody waiting for it."""
    return moved(tensor.pin_memory() if device.type == "cuda" else tensor, device)


def host_of(tensor: Tensor) -> Tensor | None:
    """The same numbers on the host, where they are known there."""
    if tensor.device.type == "cpu":
        return tensor
    copied: Copied | None = getattr(tensor, HOST, None)
    return copied.source if copied is not None and copied.version == tensor._version else None


def with_positions(base: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with position_ids (3, B, L), where the model would make them of the others: M-RoPE
    of Qwen-VL has a row for time, height and width each. Without a mask that masks nothing.
    """
    below = getattr(base, base.base_model_prefix, base)
    if not hasattr(below, "compute_3d_position_ids") or "position_ids" in inputs:
        return inputs
    names = inspect.signature(below.get_rope_index).parameters
    given = {name: inputs[name] for name in names if inputs.get(name) is not None}
    has_media = any(name.endswith("_grid_thw") for name in given)
    known = {name: host_of(tensor) for name, tensor in given.items()}
    if not has_media or any(tensor is None for tensor in known.values()):
        return inputs
    made: dict[int, Tensor] = vars(known["input_ids"]).setdefault(POSITIONS, {})
    if id(below) not in made:
        made[id(below)] = below.get_rope_index(**known)[0]
    position_ids = made[id(below)]
    mask = known.get("attention_mask")
    if mask is not None and bool(mask.all()):  # the model would look, to leave it out
        inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
    return inputs | {"position_ids": _to(position_ids, inputs["input_ids"].device)}


def functions_of(models: Iterable[nn.Module | None]) -> list[Replacement]:
    """Functions of sizes of pictures, in the modules of Python in which models call them."""
    names = {type(m).__module__ for model in models if model is not None for m in model.modules()}
    return [
        Replacement(module, name, answered(function))
        for module in (sys.modules[name] for name in sorted(names))
        for name, function in vars(module).items()
        if _is_of_sizes(function)
    ]


def answered(function: Callable) -> Callable:
    @wraps(function)
    def run(grid_thw: Tensor, *args: Any, **kwargs: Any) -> Any:
        device, host = getattr(grid_thw, GOES_TO, grid_thw.device), host_of(grid_thw)
        if host is None or device.type == "cpu":
            return function(grid_thw, *args, **kwargs)

        def ask() -> Any:
            answer = _answer(function, host, args, kwargs)
            return tree_map(lambda value: _to(value, device), answer)

        return _through(ask)

    return run


def _through(ask: Callable[[], Any]) -> Any:
    return ask()


@contextmanager
def answers_kept(answers: list[Any]) -> Iterator[None]:
    """Within it every answer is appended, as it is on the device."""

    def keep(ask: Callable[[], Any]) -> Any:
        answers.append(ask())
        return answers[-1]

    with replaced(sys.modules[__name__], "_through", keep):
        yield


@contextmanager
def answers_given(answers: list[Any]) -> Iterator[None]:
    """Within it answers are those of before, in order: nothing goes to the device again."""
    given = iter(answers)
    with replaced(sys.modules[__name__], "_through", lambda ask: next(given)):
        yield


def index_of(base: Any) -> list[Replacement]:
    """The replacement of a model's method that counts positions row by row."""
    kind = type(getattr(base, base.base_model_prefix, base))
    method = vars(kind).get(INDEX)
    return [] if method is None else [Replacement(kind, INDEX, index_answered(method))]


def index_answered(function: Callable) -> Callable:
    signature = inspect.signature(function)
    others = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        given = {name: value for name, value in given.items() if name not in others}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        known = {name: host_of(tensor) for name, tensor in tensors.items()}
        if any(tensor is None for tensor in known.values()):
            return function(*args, **kwargs)
        answer = function(**(given | known))
        devices = [tensor.device for tensor in tensors.values()]
        return tree_map(lambda value: _to(value, devices[0]), answer)

    return run


_answers: OrderedDict[Any, Any] = OrderedDict()  # the last ones, by function, sizes and numbers


def _answer(function: Callable, sizes: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
    """What follows from sizes and numbers alone is kept; with a config, or tensors that were made
    before, the function is asked anew.
    """
    numbers = {name: value for name, value in kwargs.items() if name != "kwargs"}
    is_plain = all(isinstance(value, (int, float, str)) for value in (*args, *numbers.values()))
    if not is_plain or any(isinstance(v, Tensor) for v in (kwargs.get("kwargs") or {}).values()):
        return function(sizes, *args, **kwargs)
    name = f"{function.__module__}.{function.__qualname__}"
    key = (name, str(sizes.tolist()), args, tuple(sorted(numbers.items())))
    if key not in _answers:
        _answers[key] = function(sizes, *args, **kwargs)
    _answers.move_to_end(key)
    while len(_answers) > NUM_ANSWERS:
        _answers.popitem(last=False)
    return _answers[key]


def _to(value: Any, device: torch.device) -> Any:
    return sent(value, device) if isinstance(value, Tensor) else value


def _is_of_sizes(value: Any) -> bool:
    return (
        callable(value)
        and getattr(value, "__module__", None) == FUNCTIONS
        and next(iter(inspect.signature(value).parameters), None) == "grid_thw"
    )

"""Functions of token_weighting by name: those that are built in, and module:function.

A name is what a command line and a checkpoint can hold.
"""

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from gold_trainer.data.row_errors import told
from gold_trainer.nearest import did_you_mean
from gold_trainer.weighting.picture_detail import PictureDetail

BUILT_IN = {PictureDetail.name: PictureDetail}


def find_weighting(name: str, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """The function, of one that is built in with its arguments; ValueError where there is none."""
    if name in BUILT_IN:
        return _built_in(name, kwargs)
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(
            f"GOLDConfig: token_weighting must be one of {', '.join(BUILT_IN)}, or module:function "
            f"of a function of yours, got {name!r}{did_you_mean(name, BUILT_IN)}; None weighs all "
            "tokens alike."
        )
    try:
        module = _imported(module_name)
    except Exception as error:  # of the module's own code
        raise ValueError(
            f"GOLDConfig: token_weighting must name a module that can be imported, got {name!r} "
            f"({type(error).__name__}: {told(error)}); mend it, or start where the module is."
        ) from error
    function: Any = module
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise ValueError(
            f"GOLDConfig: token_weighting must name a function, got {name!r}, of which "
            f"{module_name} has {'none' if function is None else type(function).__name__}; write "
            "module:function."
        )
    check_arguments(function, name, kwargs)
    return function


def check_arguments(function: Callable[..., Any], name: str, kwargs: Mapping[str, Any]) -> None:
    """ValueError for a function that cannot be called with these beside the tokens."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of C code
        return
    try:
        signature.bind(None, **kwargs)
    except TypeError as error:
        others = list(signature.parameters)[1:]
        unknown = next((given for given in kwargs if given not in others), "")
        raise ValueError(
            f"GOLDConfig: token_weighting_kwargs must be what {name} takes beside the tokens, "
            f"{', '.join(others) or 'nothing'}, got {dict(kwargs)} ({told(error)})"
            f"{did_you_mean(unknown, others) or '.'}"
        ) from error


def _built_in(name: str, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    kind = BUILT_IN[name]
    numbers = [field.name for field in dataclasses.fields(kind)]
    for given, value in kwargs.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if given not in numbers or not (is_number or value is None):
            raise ValueError(
                f"GOLDConfig: token_weighting_kwargs must hold numbers of {name}, got "
                f"{given}={value!r}; they are {', '.join(numbers)}."
            )
    weighting = kind(**kwargs)
    try:
        weighting.check()
    except TypeError as error:  # None, where there has to be a number
        raise ValueError(
            f"GOLDConfig: token_weighting_kwargs must hold numbers of {name}, got {dict(kwargs)} "
            f"({told(error)}); None is for temperature and max_weight."
        ) from error
    return weighting


def _imported(name: str) -> Any:
    """Also from the folder that a command line is started in, which is not on Python's path."""
    folder = os.getcwd()
    is_new = folder not in sys.path and "" not in sys.path
    if is_new:
        sys.path.append(folder)
    try:
        return import_module(name)
    finally:
        if is_new:
            sys.path.remove(folder)


def name_of(function: Any) -> str | None:
    """module:function of a callable, if that leads back to it."""
    module = getattr(function, "__module__", None)
    place = getattr(function, "__qualname__", "")
    found: Any = sys.modules.get(str(module))
    for part in place.split("."):
        found = getattr(found, part, None)
    return f"{module}:{place}" if place and found is function else None

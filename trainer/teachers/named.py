"""Which teacher an argument or the config names, before anything of it is read."""

from pathlib import Path
from typing import Any

from gold_trainer.caching import store
from gold_trainer.config import GOLDConfig
from gold_trainer.fields.teacher import (
    args_by_teacher,
    is_address,
    refuse_bare_address,
    take_address,
)
from gold_trainer.teachers.cached import open_cache
from gold_trainer.teachers.served.check import find_server


def source_of(teacher_model: Any, args: GOLDConfig) -> Any:
    """The teacher: an object or a checkpoint's name; where it is cached, the folder with its config
    and processor. Of several, the first.
    """
    if args.teacher_models is not None:
        if teacher_model is not None:
            got = teacher_model if isinstance(teacher_model, str) else type(teacher_model).__name__
            raise ValueError(
                f"GOLDTrainer: teacher_model must be None with teacher_models, got {got}; leave "
                "one of them out."
            )
        return source_of(None, next(iter(args_by_teacher(args).values())))
    refuse_bare_address(teacher_model)
    if is_address(teacher_model):
        take_address(args, teacher_model)
        args.check_served()
    elif isinstance(teacher_model, str):
        args.teacher_model_name_or_path = teacher_model
    is_object = teacher_model is not None and not isinstance(teacher_model, str)
    for name in ("teacher_cache", "teacher_model_server_url"):
        if is_object and getattr(args, name) is not None:
            raise ValueError(
                f"GOLDTrainer: teacher_model must be None or a name with {name}, got "
                f"{type(teacher_model).__name__}; the {_other(name)} is asked in its place: leave "
                "it out."
            )
    if args.teacher_cache is not None:
        open_cache(args)
        return str(Path(args.teacher_cache) / store.TEACHER)
    if args.teacher_model_server_url is not None:
        find_server(args)  # that it is there shows before weights are read
    return teacher_model if is_object else args.teacher_model_name_or_path


def live_source(args: GOLDConfig) -> str:
    """The teacher of which a cache is made."""
    if args.teacher_model_server_url is not None:
        find_server(args)
    return str(args.teacher_model_name_or_path)


def _other(name: str) -> str:
    return "cache" if name == "teacher_cache" else "server"

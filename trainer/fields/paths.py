"""Fields that are paths: ~ and $HOME, which a shell reads where it sees them, are read here too."""

import os
import re
from typing import Any

PATHS = (
    *("output_dir", "resume_from_checkpoint", "model_name_or_path", "dataset_name"),
    *("eval_dataset_name", "picture_folder", "teacher_model_name_or_path", "teacher_cache"),
    *("teacher_tokenizer_name_or_path", "vllm_sync_dir", "deepspeed", "fsdp_config"),
    "accelerator_config",
)
DICTS = ("teacher_models", "model_init_kwargs", "teacher_model_init_kwargs")  # that may hold paths
BEGINS = re.compile(r"~|.*\$[\w{(]")
LEFT = re.compile(r"\$(\w+|\{[^}]*\}?|\([^)]*\)?)")


def expand_paths(config: Any, owner: str) -> None:
    """Read ~ and variables in the paths of a dataclass of fields. ValueError for a variable that is
    not set: a folder of that name would be made.
    """
    for name in PATHS:
        value = getattr(config, name, None)
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            setattr(config, name, expanded(value, name, owner))
    for name in DICTS:
        value = getattr(config, name, None)
        if isinstance(value, dict) and any(_is_open(part) for part in value.values()):
            parts = {
                key: expanded(part, f"{name}, {key}", owner) if _is_open(part) else part
                for key, part in value.items()
            }
            setattr(config, name, parts)


def _is_open(value: Any) -> bool:
    return isinstance(value, str) and BEGINS.match(value) is not None


def expanded(value: str, name: str, owner: str) -> str:
    if not _is_open(value) or os.path.exists(value):
        return value
    path = os.path.expandvars(os.path.expanduser(value))
    left = LEFT.search(path)
    if left is not None and not os.path.exists(path):
        raise ValueError(
            f"{owner}: {name} must be a path, got {value!r}, of which {left[0]} is no variable of "
            "the environment; set it, or write what it stands for."
        )
    return path

"""Some tensors of a checkpoint, by the names that they have in the model: no other is read."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

# For a file that is not there: None, and no error.
QUIETLY: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_gated_repo": False,
    "_raise_exceptions_for_connection_errors": False,
}


def read_tensors(
    name_or_path: str,
    model: PreTrainedModel,  # its names are those of the tensors; made without weights
    wanted: Collection[str],
    options: Mapping[str, Any],  # of the hub
) -> dict[str, Tensor]:
    """The wanted tensors that the checkpoint has, on the CPU, in the types of its files."""
    options = {key: value for key, value in options.items() if key != "trust_remote_code"}
    index = cached_file(name_or_path, SAFE_WEIGHTS_INDEX_NAME, **options, **QUIETLY)
    if index is not None:
        files: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        sources = _sources(files, model, wanted)
        paths = {
            file: cached_file(name_or_path, file, **options)
            for file in {files[key] for key in sources.values()}
        }
        return {name: _read(paths[files[key]], key) for name, key in sources.items()}
    path = cached_file(name_or_path, SAFE_WEIGHTS_NAME, **options, **QUIETLY)
    if path is None:
        raise ValueError(
            "GOLDTrainer: a served teacher's checkpoint must have safetensors files, of which its "
            f"norm and head are read, got {name_or_path!r} without; save it with save_pretrained."
        )
    with safe_open(path, framework="pt") as file:
        sources = _sources(file.keys(), model, wanted)
    return {name: _read(path, key) for name, key in sources.items()}


def _sources(
    keys: Collection[str], model: PreTrainedModel, wanted: Collection[str]
) -> dict[str, str]:
    """The checkpoint's name of each, as from_pretrained would find it."""
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    state = model.state_dict()
    found = {}
    for key in keys:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name in wanted:
            found[name] = key
    return found


def _read(path: Any, key: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
    # out of the file's mapping: a head is used at every step
    return tensor.clone(memory_format=torch.contiguous_format)

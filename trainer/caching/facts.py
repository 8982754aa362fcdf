"""Facts of a teacher cache: all that changes what the teacher says of a row, beside the row.

Weights and how they are loaded, precision, processor, chat template, lengths. A run that differs in
one of them is refused by its name.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file, extract_commit_hash

from gold_trainer.caching.keys import file_digest, text_digest
from gold_trainer.config import GOLDConfig
from gold_trainer.fields.checks import as_dict
from gold_trainer.loading import hub_options
from gold_trainer.rendering.collator import Processor
from gold_trainer.rendering.prompts import tokenizer_of

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
CONFIG = "config.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt")
TEXTS = (".json", ".jinja", ".txt", ".model", ".py", ".tiktoken")
LARGEST_TEXT = 256 << 20  # bytes of a tokenizer's file, at most
# Arguments of from_pretrained that say where weights are, and not what they compute.
PLACES = (
    *("token", "cache_dir", "revision", "subfolder", "trust_remote_code", "local_files_only"),
    *("device_map", "max_memory", "offload_folder", "offload_state_dict", "low_cpu_mem_usage"),
)
# Keys of a processor's or model's config that change with whoever saves it.
VOLATILE = ("transformers_version", "_name_or_path", "name_or_path", "processor_class", "auto_map")
# What to do about a fact that differs, where it is not the field of the same name.
REMEDIES = {
    "weights": "the teacher has other weights than those that were cached",
    "commit": "the hub has another version of the teacher: set teacher_model_revision",
    "precision": "set bf16 or fp16 as it was",
    "prompts_cut_to": "on_long_prompt, max_length and max_completion_length decide it",
    "chat_template": "the processor's template is another",
    "tokenizer": "its vocabulary or merges are others",
    "image_processor": "its sizes or normalisation are others",
    "student_head": "the student's lm_head is another, or of another dtype",
    "teacher_temperature": "loss_teacher_temperature or loss_temperature is it",
    "vocabulary": "the heads of student and teacher have another number of tokens in common",
    "video_processor": "its frames or sizes are others",
}


def facts_of_args(args: GOLDConfig) -> dict[str, Any]:
    """What a config alone says."""
    kwargs = as_dict(args.chat_template_kwargs)
    return {
        "precision": precision_of(args),
        "max_length": args.max_length,
        "prompts_cut_to": args.cut_to,
        "chat_template_kwargs": _as_text(kwargs),
    }


def precision_of(args: GOLDConfig) -> str:
    named = next((name for name in ("bf16", "fp16") if getattr(args, name)), None)
    return named or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def facts_of_processor(processor: Processor) -> dict[str, Any]:
    """What tells the processor with which the teacher sees rows from another."""
    template = processor.chat_template or tokenizer_of(processor).chat_template
    facts = {"chat_template": text_digest(template), "tokenizer": _tokenizer(processor)}
    for name in ("image_processor", "video_processor"):
        part = getattr(processor, name, None)
        if part is not None:
            facts[name] = text_digest(_stable(part.to_dict()))
    return facts


def _tokenizer(processor: Processor) -> str:
    tokenizer = tokenizer_of(processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        return text_digest(sorted(tokenizer.get_vocab().items()))
    state = json.loads(backend.to_str())
    state.pop("padding", None)  # those of the last call
    state.pop("truncation", None)
    return text_digest(json.dumps(state, sort_keys=True))


def _stable(config: Mapping[str, Any]) -> str:
    return _as_text({k: v for k, v in config.items() if k not in VOLATILE and v is not None})


def _as_text(values: Any) -> str:
    """JSON in which a torch.dtype and its name are the same."""
    return json.dumps(values, sort_keys=True, default=lambda v: str(v).removeprefix("torch."))


def facts_of_teacher(args: GOLDConfig, name: str) -> dict[str, Any]:
    """What tells the teacher's weights from others, where their files or their commit are known,
    and how they are loaded. Files are looked into here and there, not read.
    """
    given = as_dict(args.teacher_model_init_kwargs)
    kept = {key: value for key, value in given.items() if key not in PLACES}
    facts = {"teacher_model_init_kwargs": _as_text(kept)}
    folder = folder_of(args, name)
    if folder is None:
        return facts
    if not Path(name).is_dir():  # a snapshot of the hub's, in a folder of its commit's name
        return facts | {"commit": extract_commit_hash(str(folder / CONFIG), None)}
    weights = sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)
    if not weights:
        return facts
    config: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    parts = [f"{path.name} {file_digest(path)}" for path in weights]
    return facts | {"weights": text_digest([*parts, _stable(config)])}


def folder_of(args: GOLDConfig, name: str) -> Path | None:
    """Where the files of the teacher are; None where they are not here."""
    options = hub_options(args.teacher_model_init_kwargs, args.teacher_model_revision)
    subfolder = options.pop("subfolder", "")
    if Path(name).is_dir():
        return Path(name) / subfolder
    options.pop("trust_remote_code", None)
    with suppress(OSError, ValueError):
        path = cached_file(name, CONFIG, subfolder=subfolder, **options)
        return None if path is None else Path(path).parent
    return None


def copy_description(args: GOLDConfig, name: str, target: Path) -> None:
    """Config, tokenizer and processor of the teacher, as they are: training needs no more of its
    folder.
    """
    source = folder_of(args, name)
    assert source is not None, "the teacher's config has been read from there"
    target = target / hub_options(args.teacher_model_init_kwargs).get("subfolder", "")
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        is_text = path.suffix in TEXTS and not path.name.endswith(".index.json")
        if path.is_file() and is_text and path.stat().st_size <= LARGEST_TEXT:
            shutil.copyfile(path, target / path.name)
    more = source / "additional_chat_templates"
    if more.is_dir():
        shutil.copytree(more, target / more.name, dirs_exist_ok=True)


def refuse_other_facts(folder: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """ValueError for the first fact in which a run differs from its cache."""
    for name, value in here.items():
        if name in there and there[name] != value:
            what = REMEDIES.get(name, f"set {name} as it was")
            got = f"{_shown(there[name])}, this run has {_shown(value)}"
            raise ValueError(
                f"teacher_cache {folder} was made with {name} {got}: {what}, or make another cache "
                "with gold-trainer cache-teacher."
            )


def _shown(value: Any) -> str:
    text = str(value)
    is_digest = len(text) == 32 and set(text) <= set("0123456789abcdef")
    return text[:8] if is_digest else text

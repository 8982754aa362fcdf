"""Chat templates of real models, read from the installed package trl, and real tokenizers that know
their marks.
"""

import importlib.util
import os
import re
from copy import copy, deepcopy
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken

from support.tokenizers_cases import table

# What templates write that their tokenizers know as special tokens.
MARKS = re.compile(
    r"<\|[\w.]+\|>|<\uff5c[^<>\uff5c]+\uff5c>|</?(?:start|end)_of_\w+>|<\|\w+>|<\w+\|>|<end_of_text>"
)
TEXT_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # known, but not special
END_OF_TEXT = "<|base_end|>"  # a base model's eos: no template writes it
LITERALS = ("<|im_end|>", "<|eot_id|>", END_OF_TEXT, "<end_of_turn>", "<|return|>", "</s>")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
# Templates of processors, and those that need a bos that these tokenizers do not have.
OTHERS = ("idefics3", "smolvlm", "llava_next", "llama3")
# Conversations that a property is tried on; `make fuzz` sets more.
NUM_EXAMPLES = int(os.environ.get("GOLD_TEMPLATE_EXAMPLES", "0"))


def template_folder() -> Path | None:
    spec = importlib.util.find_spec("trl")
    return None if spec is None else Path(spec.submodule_search_locations[0]) / "chat_templates"


def template_names() -> list[str]:
    """Names of templates for inference: the variants for training mark what an assistant says."""
    folder = template_folder()
    if folder is None:
        return []
    return sorted(p.stem for p in folder.glob("*.jinja") if not p.stem.endswith("_training"))


def text_template_names() -> list[str]:
    return [name for name in template_names() if name not in OTHERS]


def _source(name: str) -> str:
    folder = template_folder()
    assert folder is not None, "template_names() is empty without trl"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


@lru_cache
def _tokenizer(tokenizer_name: str):
    """A base model's tokenizer that knows the special tokens of all templates."""
    tokenizer = deepcopy(table(tokenizer_name).tokenizer)
    special = {mark for name in template_names() for mark in MARKS.findall(_source(name))}
    tokenizer.add_special_tokens(
        {"extra_special_tokens": sorted({*special, END_OF_TEXT})},
        replace_extra_special_tokens=False,
    )
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in TEXT_MARKS])
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TEXT
    return tokenizer


def templated(name: str, tokenizer_name: str):
    """The tokenizer with a template of its own; the rest is one for all, it takes half a second."""
    tokenizer = copy(_tokenizer(tokenizer_name))
    tokenizer.chat_template = _source(name)
    return tokenizer

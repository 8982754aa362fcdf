"""What a checkpoint holds beside weights and optimizer can be written: seen before the first step,
and not when the first checkpoint is due.
"""

import io
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from gold_trainer.config import GOLDConfig
from gold_trainer.data.row_errors import told
from gold_trainer.models import base_model, has_adapter
from gold_trainer.rendering.prompts import tokenizer_of

logger = logging.getLogger(__name__)

NAMED = re.compile(r"^- `(\w+)`:", re.MULTILINE)  # as GenerationConfig.validate lists them


def check_savable(student: nn.Module, processor: Any, args: GOLDConfig, *, is_due: bool) -> None:
    """ValueError for what would end the run where it is saved; a warning unless that is_due."""
    base: Any = base_model(student)
    if base.generation_config is None:
        base.generation_config = GenerationConfig.from_model_config(base.config)
    leave_out_idle(base.generation_config)
    parts = {
        "config of the student": base.config.save_pretrained,
        "generation_config of the student": base.generation_config.save_pretrained,
        "processing_class": processor.save_pretrained,
        "args": lambda folder: torch.save(args, io.BytesIO()),
    }
    if has_adapter(student):  # which is saved without its base
        adapter: Any = student
        parts["config of the adapter"] = adapter.peft_config[adapter.active_adapter].save_pretrained
        del parts["config of the student"], parts["generation_config of the student"]
    for name, save in parts.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                save(folder)
        except Exception as error:  # whatever its values lead it to
            text = (
                f"GOLDTrainer: the {name} must be one that can be saved, got "
                f"{type(error).__name__} ({told(error)}); mend it, or no checkpoint can be written."
            )
            if is_due:
                raise ValueError(text) from error
            logger.warning("%s", text)


@contextmanager
def saved_as_it_came(student: nn.Module, processor: Any) -> Iterator[None]:
    """Around the Trainer's constructor, which writes use_cache=False into the student's config. The
    forward pass is told so anyway. And prompts are padded on the left: the tokenizer's file would
    say so, and a tokenizer without a padding_side of its own would be read as one of the left.
    """
    config, absent = base_model(student).config, object()
    use_cache = vars(config).get("use_cache", absent)
    tokenizer: Any = tokenizer_of(processor)
    tokenizer.init_kwargs.setdefault("padding_side", tokenizer.padding_side)
    yield
    if use_cache is absent:
        vars(config).pop("use_cache", None)
    else:
        config.use_cache = use_cache


def leave_out_idle(generation: GenerationConfig) -> None:
    """Flags that have no effect, as a temperature without do_sample: published models have them,
    and transformers saves none that the Trainer has given the tokenizer's special tokens.
    """
    try:
        generation.validate(strict=True)
    except ValueError as error:
        names = NAMED.findall(str(error))
        for name in names:
            setattr(generation, name, None)
        if names:
            logger.warning(
                "GOLDTrainer: the student is saved without those flags of its generation_config "
                "that have no effect: %s.",
                ", ".join(names),
            )

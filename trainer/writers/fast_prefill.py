"""What surrounds a prompts' pass so that the host does not wait for the device within it, as in a
training step (speed/step.py), and pictures attend in one call a layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

from gold_trainer.config import GOLDConfig
from gold_trainer.data.row_errors import first_line
from gold_trainer.speed.answers import answers_of
from gold_trainer.speed.attention import without_cudnn
from gold_trainer.speed.on_host import index_of
from gold_trainer.speed.replacing import all_replaced
from gold_trainer.speed.segments import (
    OF_SEGMENTS,
    attention_is,
    can_attend,
    configs_of,
    dtype_of_products,
)
from gold_trainer.teachers.layer_stream import outermost_lists
from gold_trainer.writers.prefill import CannotDecode, Prefilled

logger = logging.get_logger(__name__)


class FastPrefill:
    def __init__(self, base: Any, args: GOLDConfig, name: str) -> None:  # a transformers model
        self.name = name
        self.answers = [*answers_of([base]), *index_of(base)]
        self.configs = towers_of(base, args) if args.device.type == "cuda" else []

    def run(self, prefill: Callable[[], Prefilled]) -> Prefilled:
        if self.configs:
            try:
                return self._run(prefill)
            except (torch.OutOfMemoryError, CannotDecode):
                raise
            except Exception as error:  # the model's own comes again
                logger.warning(
                    "%s writes with its own attention of pictures, which costs time: %s.",
                    self.name,
                    first_line(error),
                )
                self.configs = []
        return self._run(prefill)

    def _run(self, prefill: Callable[[], Prefilled]) -> Prefilled:
        own = attention_is(OF_SEGMENTS, self.configs)
        with without_cudnn(), all_replaced(self.answers), own:  # prompts' lengths come but once
            return prefill()


def towers_of(base: Any, args: GOLDConfig) -> list[Any]:
    """Configs of layers whose attention can be that of segments: each is read by these alone."""
    configs: list[Any] = []
    for _, layers in outermost_lists(base):
        weight = next(layers[0].parameters(), None) if len(layers) else None
        if weight is None or len({type(layer) for layer in layers}) > 1:
            continue
        if can_attend(weight.device, dtype_of_products(weight, args)):
            configs += configs_of(list(layers))
    return configs

"""Who completes prompts: one file a kind, chosen here."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from gold_trainer.collator import GOLDCollator
from gold_trainer.config import GOLDConfig
from gold_trainer.writers.local import LocalWriter
from gold_trainer.writers.writer import Writer

__all__ = ["LocalWriter", "Writer", "make_writer"]


def make_writer(
    writing: Callable[[], AbstractContextManager[nn.Module]],  # the model, ready to write
    collator: GOLDCollator,  # of its side
    args: GOLDConfig,
) -> Writer:
    return LocalWriter(writing, collator, args)

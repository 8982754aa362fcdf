"""Who completes prompts: one file a kind."""

from gold_trainer.writers.local import LocalWriter
from gold_trainer.writers.writer import Writer

__all__ = ["LocalWriter", "Writer"]

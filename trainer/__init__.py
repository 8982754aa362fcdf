"""GOLD distillation on transformers.Trainer, with the fused losses of gold_kernels."""

from gold_trainer.collator import GOLDCollator
from gold_trainer.config import GOLDConfig
from gold_trainer.trainer import GOLDTrainer

__all__ = ["GOLDCollator", "GOLDConfig", "GOLDTrainer"]

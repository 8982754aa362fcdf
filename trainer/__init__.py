"""GOLD distillation on transformers.Trainer, with the fused losses of gold_kernels."""

from trainer.collator import GOLDCollator
from trainer.config import GOLDConfig
from trainer.gold_trainer import GOLDTrainer

__all__ = ["GOLDCollator", "GOLDConfig", "GOLDTrainer"]

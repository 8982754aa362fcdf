"""Distillation from a model in the same process, as a plugin of axolotl:

    plugins:
      - gold_kernels.integrations.axolotl.DistillationPlugin
    distillation_teacher: Qwen/Qwen3-8B
    distillation_beta: 0.5

B sequences, L positions.
"""

from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel
from torch import Tensor, nn

from gold_kernels.engine.logit_form import forward_is
from gold_kernels.integrations.trl.jsd import IGNORED, fused_jsd
from gold_kernels.integrations.trl.pending import HiddenModel, NotTakenError
from gold_kernels.jsd.row_loss import JSD

FUNCTION = "DistillationPlugin"


class DistillationArgs(BaseModel):
    """Fields of the config."""

    distillation_teacher: str | None = None  # a model with the student's tokenizer; None: no plugin
    distillation_beta: float = 0.5
    distillation_temperature: float = 1.0
    # entries that both vocabularies have, where heads of one tokenizer are padded differently
    distillation_vocab_size: int | None = None


class DistillationPlugin(BasePlugin):
    """The generalized JSD on the labels' tokens, in the place of the cross-entropy."""

    def get_input_args(self) -> str:
        return f"{__name__}.{DistillationArgs.__name__}"

    def get_trainer_cls(self, cfg: Any) -> type | None:
        if not cfg.distillation_teacher:
            _check_nothing_is_lost(cfg)
            return None
        JSD(cfg.distillation_beta, cfg.distillation_temperature).check(FUNCTION)
        from axolotl.core.trainers.base import AxolotlTrainer

        return type("DistillationTrainer", (DistillationMixin, AxolotlTrainer), {})

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if isinstance(trainer, DistillationMixin):
            from transformers import AutoModelForCausalLM

            teacher = AutoModelForCausalLM.from_pretrained(cfg.distillation_teacher, dtype="auto")
            trainer.teacher = teacher.to(trainer.args.device).eval().requires_grad_(False)
            trainer.divergence = cfg.distillation_beta, cfg.distillation_temperature
            _check_heads(trainer.model, trainer.teacher, cfg.distillation_vocab_size)
            trainer.vocab_size = cfg.distillation_vocab_size


class DistillationMixin:
    """compute_loss of a transformers.Trainer, with a teacher and a divergence."""

    args: Any
    model: Any
    teacher: nn.Module
    divergence: tuple[float, float]  # beta, temperature
    vocab_size: int | None

    def compute_loss(
        self: Any,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise ValueError(
                f"{FUNCTION}: a batch with labels is expected, of whose tokens the divergence is "
                f"taken, got {', '.join(inputs)}; choose a dataset type that labels "
                "what is to be learnt."
            )
        shifted = torch.full_like(labels, IGNORED)  # (B, L): of the next token
        shifted[:, :-1] = labels[:, 1:]
        student = self.accelerator.unwrap_model(model)
        try:
            sides = HiddenModel(student, student.forward), HiddenModel(self.teacher, self.teacher)

            def at_model(batch: dict[str, Any]) -> Tensor:
                with torch.no_grad():
                    expected = sides[1](**batch).logits
                logits = sides[0](**batch).logits
                beta, temperature = self.divergence
                numbers = beta, temperature, num_items_in_batch
                return fused_jsd(
                    logits, expected, shifted, *numbers, {}, vocab_size=self.vocab_size
                )

            with forward_is(student, at_model):
                loss = model(inputs)
        except NotTakenError as error:
            raise ValueError(
                f"{FUNCTION}: models with a plain lm_head are expected, got {error}; leave "
                "lm_head out of the adapter's and the quantisation's modules."
            ) from error
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean of ranks
        return (loss, {"loss": loss}) if return_outputs else loss


def _check_nothing_is_lost(cfg: Any) -> None:
    """Without a teacher the plugin does nothing."""
    for name, field in DistillationArgs.model_fields.items():
        value = getattr(cfg, name, field.default)
        if name != "distillation_teacher" and value not in (None, field.default):
            raise ValueError(
                f"{FUNCTION}: distillation_teacher is expected beside {name}, got {name} {value} "
                "alone; name the teacher, or leave the field out."
            )


def _check_heads(student: Any, teacher: Any, vocab_size: int | None) -> None:
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (student, teacher)]
    if vocab_size is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"{FUNCTION}: one vocabulary is expected, got {sizes[0]} entries of a student "
            f"and {sizes[1]} of its teacher; set distillation_vocab_size to the tokenizer's length "
            "if both are padded heads of one tokenizer."
        )
    if vocab_size is not None and not 1 <= vocab_size <= min(sizes):
        raise ValueError(
            f"{FUNCTION}: distillation_vocab_size must be in [1, {min(sizes)}], the smaller of "
            f"both heads, got {vocab_size}; set it to the tokenizer's length."
        )

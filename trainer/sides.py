"""Student or teacher, as the loss and the data see it: head, form of its logits, collator."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gold_trainer import models
from gold_trainer.collator import GOLDCollator, Processor
from gold_trainer.config import GOLDConfig
from gold_trainer.logit_form import LogitForm
from gold_trainer.loss_at_head import run_to_head
from gold_trainer.speed.on_host import with_positions


@dataclass(frozen=True)
class Side:
    head: models.Head  # weight (V, D)
    place: nn.Module  # where the model calls it
    form: LogitForm
    collator: GOLDCollator

    def run(
        self,
        model: nn.Module,
        wrapper: nn.Module,  # that is called: DDP, or the model itself
        tensors: dict[str, Tensor],
        function: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Any]:
        """function(hidden (B, L, D)) in the place of the head, and the model's output."""
        inputs = with_positions(models.base_model(model), models.forward_inputs(model, tensors))
        return run_to_head(model, wrapper, self.place, self.form, inputs, function)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        name: str,  # "student" or "teacher", for messages
        processor: Processor,
        args: GOLDConfig,
        *,
        is_below_adapter: bool = False,
    ) -> "Side":
        config = models.base_model(model).config
        template_kwargs = args.chat_template_kwargs
        assert not isinstance(template_kwargs, str), "TrainingArguments reads the JSON"
        return cls(
            *models.lm_head(model, name, is_below_adapter=is_below_adapter),
            LogitForm(name),
            GOLDCollator(
                processor,
                models.end_ids_of(model, processor),
                args.max_length,
                models.placeholder_ids_of(config),
                template_kwargs,
                args.cut_to,
            ),
        )

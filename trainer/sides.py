"""Student or teacher, as the loss and the data see it: head, form of its logits, collator."""

from dataclasses import dataclass

from torch import nn

from gold_trainer import models
from gold_trainer.collator import GOLDCollator, Processor
from gold_trainer.config import GOLDConfig
from gold_trainer.logit_form import LogitForm


@dataclass(frozen=True)
class Side:
    head: models.Head  # weight (V, D)
    place: nn.Module  # where the model calls it
    form: LogitForm
    collator: GOLDCollator

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

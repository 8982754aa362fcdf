"""Student or teacher, as the loss and the data see it: head, form of its logits, collator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from gold_trainer import models
from gold_trainer.batches import SideInputs
from gold_trainer.config import GOLDConfig
from gold_trainer.fields.checks import as_dict
from gold_trainer.logit_form import LogitForm
from gold_trainer.loss_at_head import gather_rows, run_to_head
from gold_trainer.rendering.collator import GOLDCollator, Processor
from gold_trainer.speed.on_host import with_positions
from gold_trainer.speed.packing import packed


class StoredEntries(NamedTuple):
    """A cache, or a server, that has a teacher's likeliest tokens in the place of hidden states."""

    place: str
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Side:
    head: models.Head  # weight (V, D)
    place: nn.Module  # where the model calls it
    form: LogitForm
    collator: GOLDCollator
    entries: StoredEntries | None = None  # None: it gives hidden states

    def run(
        self,
        model: nn.Module,
        wrapper: nn.Module,  # that is called: DDP, or the model itself
        inputs: SideInputs,
        function: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Any]:
        """function(hidden (N, D) at the scored rows) in the place of the head, and the model's
        output.
        """
        tensors = models.forward_inputs(model, inputs.tensors)
        tensors = with_positions(models.base_model(model), tensors)
        mask = inputs.tensors["attention_mask"]
        tensors, rows = packed(model, tensors, mask, inputs.scored_rows, inputs.shared)

        def at_head(hidden: Tensor) -> Tensor:  # (B, L, D)
            return function(gather_rows(hidden, rows))

        return run_to_head(model, wrapper, self.place, self.form, tensors, at_head)

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
        return cls(
            *models.lm_head(model, name, is_below_adapter=is_below_adapter),
            LogitForm(name),
            GOLDCollator(
                processor,
                models.end_ids_of(model, processor),
                args.max_length,
                models.placeholder_ids_of(config),
                as_dict(args.chat_template_kwargs),
                args.cut_to,
            ),
        )

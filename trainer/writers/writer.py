"""What the trainer asks of a writer. A module here or a server may answer."""

from collections.abc import Sequence
from typing import Protocol

from gold_trainer.batches import Example


class Writer(Protocol):
    """Completes prompts with samples of one model, student or teacher."""

    def sync_weights(self, step: int) -> None:
        """From here on the completions are those of the model as it is at this optimizer step.

        Called on all ranks before a window's prompts. A writer that keeps a copy of the weights
        renews it here.
        """
        ...

    def complete(self, examples: Sequence[Example], seed: int) -> list[Example]:
        """The examples with completions as they were sampled: the end token kept, padding dropped.

        A completion that reaches max_completion_length, or what max_length leaves its row, has no
        end token. The same seed gives the same completions. Called on each rank for its own rows.
        """
        ...

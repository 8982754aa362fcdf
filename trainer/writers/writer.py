"""What the trainer asks of a writer. A module here or a server may answer."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gold_trainer.batches import Example, PromptTensors
from gold_trainer.config import GOLDConfig
from gold_trainer.fields.checks import as_dict
from gold_trainer.rendering.collator import GOLDCollator, until_end
from gold_trainer.rendering.prompts import token_ids_of


@dataclass(frozen=True)
class Prompt:
    """A row to be completed. Nothing in it depends on the other prompts of a call, nor on the
    number of ranks.
    """

    example: Example  # its text with one placeholder a picture; pictures and videos raw
    room: int  # most new tokens of each completion
    seed: int  # below 2**62; completion i is sampled with seed + i
    num_completions: int = 1

    @property
    def seeds(self) -> list[int]:
        return [self.seed + i for i in range(self.num_completions)]


@dataclass(frozen=True)
class Sampling:
    """The distribution of the next token from which completions are drawn, and what ends them."""

    end_ids: tuple[int, ...]  # any of them ends a completion, and stays in it
    # What may be written: no placeholders of pictures, and no rows of a head that are no token.
    token_ids: frozenset[int]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float | None = None
    repetition_penalty: float = 1.0
    stop_strings: tuple[str, ...] = ()  # end a completion too, and stay in it
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of the kind of writer

    @classmethod
    def of(cls, args: GOLDConfig, collator: GOLDCollator) -> "Sampling":
        """The run's, for the side whose collator this is."""
        kwargs = as_dict(args.generation_kwargs)
        return cls(
            tuple(sorted(collator.end_ids)),
            frozenset(token_ids_of(collator.processor) - collator.placeholder_ids),
            args.temperature,
            args.top_p,
            args.top_k,
            args.min_p,
            args.repetition_penalty,
            tuple(args.stop_strings or ()),
            kwargs,
        )

    def is_banned(self, num_entries: int) -> Tensor:  # (V,) on the CPU
        """Which rows of a head with so many may never be written. Not to be changed."""
        return _is_banned(self.token_ids, num_entries)

    def banned_ids(self, num_entries: int) -> list[int]:
        ids: list[int] = self.is_banned(num_entries).nonzero().flatten().tolist()
        return ids


@lru_cache(maxsize=4)  # of student and teacher, at every window
def _is_banned(token_ids: frozenset[int], num_entries: int) -> Tensor:  # (V,)
    is_banned = torch.ones(num_entries, dtype=torch.bool)
    is_banned[[i for i in token_ids if i < num_entries]] = False
    return is_banned


@dataclass(frozen=True)
class Completion:
    """A sample, as it was drawn: the end token kept, nothing behind it."""

    token_ids: list[int]
    logprobs: list[float]  # of each token, under the distribution that it was drawn from
    version: int  # the optimizer step whose weights wrote it

    def kept(
        self, prompt: Prompt, sampling: Sampling, tokenizer: PreTrainedTokenizerBase
    ) -> "Completion":
        """The completion without what a batch wrote behind its end, or beyond its room."""
        ids = until_end(self.token_ids[: prompt.room], sampling.end_ids)
        ids = until_stop(tokenizer, sampling.stop_strings, ids)
        return Completion(ids, self.logprobs[: len(ids)], self.version)


def have_weights(last: int | None, step: int, frequency: int) -> bool:
    """Whether those of the last step that were brought over serve for this one."""
    return last is not None and step // frequency == last // frequency


def has_stop(
    tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], ids: list[int]
) -> bool:
    text = str(tokenizer.decode(ids))
    return any(string in text for string in stop_strings)


def until_stop(
    tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], ids: list[int]
) -> list[int]:
    """Ids up to and with the first whose text completes one of the strings."""
    if not stop_strings or not has_stop(tokenizer, stop_strings, ids):
        return ids
    ends = range(len(ids))
    return ids[: bisect_left(ends, True, key=lambda n: has_stop(tokenizer, stop_strings, ids[:n]))]


class Writer(Protocol):
    """Completes prompts with samples of one model, student or teacher."""

    runs_together: bool = False  # all ranks may have to write where one does

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Callable[[], list[list[Completion]]]:
        """complete(), in the background where the writer can: the answer waits for it."""
        return partial(self.complete, prompts, sampling)

    def look_ahead(self, prompts: Sequence[Prompt]) -> None:
        """complete() may be asked for these next: what needs no weights can be done before."""
        return

    def take_made(self) -> PromptTensors | None:
        """Tensors of the last call's prompts, where it has made them; nobody else will ask for
        them.
        """
        return None

    def close(self) -> None:
        """A run has ended, perhaps with an error: nobody waits for what was started."""
        return

    def sync_weights(self, model: nn.Module | None, step: int) -> None:
        """From here on the completions are those of the model as it is at this optimizer step.

        Called on all ranks before a window's prompts. A writer that keeps a copy of the weights
        renews it here. None: no module is here.
        """
        ...

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """num_completions of each prompt. One that reaches its room has no end token. The same seed
        gives the same completion. Called on each rank for its own prompts.
        """
        ...

"""A teacher that a vLLM server runs, on other GPUs or another machine.

N_t scored rows of a batch, D_t hidden size, k likeliest tokens of a row.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gold_trainer import loading
from gold_trainer.batches import Example, SideInputs
from gold_trainer.config import GOLDConfig
from gold_trainer.rendering.collator import Processor
from gold_trainer.sides import Side, StoredEntries
from gold_trainer.teachers.absent import AbsentTeacher
from gold_trainer.teachers.served.check import (
    check_likeliest,
    check_teacher,
    find_server,
    warn_of_another,
)
from gold_trainer.teachers.served.client import Answer, HiddenStates
from gold_trainer.teachers.served.likeliest import LikeliestTokens
from gold_trainer.teachers.served.tail import Tail, read_tail
from gold_trainer.writers.background import Background
from gold_trainer.writers.vllm.requests import check_expanded, refuse_videos, unexpanded_ids
from gold_trainer.writers.vllm.server import Refused

REQUESTS = 64  # at a time, of each rank: the server makes batches of them


class ServedTeacher(AbsentTeacher):
    """Norm and head are here; rows of a micro-batch are asked for together."""

    def __init__(self, states: HiddenStates, tail: Tail, processor: Processor) -> None:
        self.states, self.tail, self.processor = states, tail, processor
        self.side = tail.side

    @classmethod
    def open(cls, name: str, processor: Processor, args: GOLDConfig) -> "ServedTeacher":
        """name: the checkpoint; processor is the one that its rows are made with."""
        server, served = find_server(args)
        warn_of_another(server, served, name)
        tail = read_tail(name, processor, args)
        width = tail.side.head.weight.shape[1]
        states = HiddenStates(server, served.id, args.teacher_request_retries, width)
        check_teacher(states, tail, processor, args)
        return cls(states, tail, processor)

    def place_rows(self, device: torch.device) -> None:
        super().place_rows(device)
        self.tail.norm.to(device)

    @torch.no_grad()
    def hidden_rows(self, inputs: SideInputs) -> Tensor:  # (N_t, D_t)
        weight = self.side.head.weight
        empty = torch.empty(0, weight.shape[1], dtype=weight.dtype, device="cpu")
        rows = torch.cat([*rows_of(inputs, self._rows_of), empty])
        return self.tail(rows.to(self.device))

    def _rows_of(self, example: Example) -> Tensor:  # (n, D_t) of the last layer
        # what the last token would predict is not scored
        behind = example.written_ids[:-1]
        answer: Answer = ask_for(self.states, example, behind, self.processor)
        return answer.hidden[-1 - len(behind) :]


class ServedTopK(AbsentTeacher):
    """Nothing of it is here: the server says which tokens are the likeliest, and how likely."""

    def __init__(self, tokens: LikeliestTokens, side: Side, processor: Processor) -> None:
        self.tokens, self.side, self.processor = tokens, side, processor

    @classmethod
    def open(cls, name: str, processor: Processor, args: GOLDConfig) -> "ServedTopK":
        """name: the checkpoint, of which config and tokenizer are read."""
        server, served = find_server(args)
        warn_of_another(server, served, name, "config and tokenizer")
        model = loading.empty_model(
            name, args.teacher_model_init_kwargs, args.teacher_model_revision
        )
        entries = StoredEntries(server.url, {})
        side = replace(Side.of(model, "teacher", processor, args), entries=entries)
        tokens = LikeliestTokens(server, served.id, args.teacher_request_retries, args.loss_top_k)
        check_likeliest(tokens, processor, args)
        return cls(tokens, side, processor)

    def hidden_rows(self, inputs: SideInputs) -> Tensor:  # (N_t, 2 k), as a cache would have them
        empty = torch.empty(0, 2 * self.tokens.k)
        return torch.cat([*rows_of(inputs, self._rows_of), empty]).to(self.device)

    def _rows_of(self, example: Example) -> Tensor:  # (n, 2 k)
        behind = example.written_ids
        answer = ask_for(self.tokens, example, behind, self.processor)
        return self.tokens.rows(answer.entries[-len(behind) :])


def rows_of(inputs: SideInputs, ask: Callable[[Example], Tensor]) -> list[Tensor]:
    """Rows of each example of which something is scored; they are asked for together."""
    examples = [example for example in inputs.examples if example.written_ids]
    return list(Background(ask, examples, REQUESTS).results())


def ask_for(states: Any, example: Example, behind: list[int], processor: Processor) -> Any:
    """What the server answers to a prompt with these tokens behind it."""
    refuse_videos(example, "is asked for", "leave teacher_model_server_url out")
    ids = [*unexpanded_ids(processor, example), *behind]
    try:
        answer = states.ask(ids, example.images)
    except Refused as error:
        raise ValueError(
            f"{example.where}: the vLLM server at {states.server.url} must take the row, "
            f"got a refusal ({error}) of {example.prompt_length + len(behind)} tokens with "
            f"pictures of {[image.size for image in example.images]}; change the row, or how "
            "the server is started."
        ) from error
    check_expanded(answer.seen_ids, example, processor, behind, "teacher")
    return answer

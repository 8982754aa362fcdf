"""A vLLM server that is asked for prompt_logprobs: ids and pictures in, of each token the likeliest
ones in its place out. It keeps no hidden states, and shares no folder with this process.

L positions, n scored tokens, k entries of each.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from gold_trainer.caching.packed import pack
from gold_trainer.teachers.served.client import ONE_TOKEN, post
from gold_trainer.writers.vllm.requests import GENERATE, body_of
from gold_trainer.writers.vllm.server import Server


class Answer(NamedTuple):
    seen_ids: list[int]  # as the server expanded them
    entries: list[Any]  # L, of each position what could have stood there


@dataclass(frozen=True)
class LikeliestTokens:
    """May be asked from several threads."""

    server: Server
    model: str  # the name to ask for
    retries: int
    k: int

    def ask(
        self,
        token_ids: list[int],  # with one placeholder a picture
        images: list[Image.Image],
    ) -> Answer:
        """Refused for what the server takes for wrong, OSError where it does not answer."""
        params = ONE_TOKEN | {"prompt_logprobs": self.k}
        answer = post(self.server, body_of(self.model, token_ids, images, params), self.retries)
        return self.server.read(GENERATE, answer, "token ids and prompt_logprobs", _told)

    def rows(self, entries: list[Any]) -> Tensor:  # of n positions -> (n, 2 k), packed
        what = f"{self.k} prompt_logprobs of a token"
        read = [self.server.read(GENERATE, entry, what, self._read) for entry in entries]
        ids, log_probs = (torch.tensor([row[i] for row in read]) for i in range(2))
        return pack(ids.reshape(-1, self.k), log_probs.reshape(-1, self.k))

    def _read(self, entry: dict[str, Any]) -> tuple[list[int], list[float]]:
        """The k likeliest; the token that stands there may be one more."""
        ranked = sorted((int(value["rank"]), int(key)) for key, value in entry.items())[: self.k]
        log_probs = [float(entry[str(key)]["logprob"]) for _, key in ranked]
        if len(ranked) < self.k:
            raise ValueError("too few of them")
        return [key for _, key in ranked], log_probs


def _told(answer: dict[str, Any]) -> Answer:
    ids, entries = list(answer["prompt_token_ids"]), list(answer["prompt_logprobs"])
    if len(ids) != len(entries):
        raise ValueError("others than one a token")
    return Answer(ids, entries)

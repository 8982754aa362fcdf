"""Completions of a vLLM server that has the student's weights."""

from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

from accelerate import PartialState
from torch import nn

from gold_trainer.config import GOLDConfig
from gold_trainer.models import base_model
from gold_trainer.ranks import on_every_rank, on_main_process
from gold_trainer.rendering.collator import GOLDCollator
from gold_trainer.rendering.prompts import tokenizer_of
from gold_trainer.writers.background import Background
from gold_trainer.writers.vllm.check import ServerInfo
from gold_trainer.writers.vllm.requests import (
    GENERATE,
    check_expanded,
    check_room,
    read_completions,
    refuse_videos,
    request_body,
    sampling_params,
)
from gold_trainer.writers.vllm.server import Refused, Server
from gold_trainer.writers.vllm.sync import make_sync
from gold_trainer.writers.writer import Completion, Prompt, Sampling, Writer, have_weights

REQUESTS = 128  # at a time, of each rank


class VLLMWriter(Writer):
    """Each rank asks for its own prompts; new weights go over from the main one."""

    def __init__(
        self,
        server: Server,
        info: ServerInfo,
        student: nn.Module,  # as far as it is known before it is spread over processes
        collator: GOLDCollator,
        args: GOLDConfig,
    ) -> None:
        self.server, self.info, self.collator, self.args = server, info, collator, args
        self.sync = make_sync(server, info, args, student)
        self.num_entries = base_model(student).config.get_text_config().vocab_size  # of the head
        self.run = ""  # in every version: another run's weights of the same step are others
        self.step: int | None = None  # of the weights that the server has
        self.version = self.model_name = ""
        self.asked: Background | None = None  # the newest prompts

    def sync_weights(self, model: nn.Module | None, step: int) -> None:
        assert model is not None, "the student is here"
        if not self.run:
            self.run = on_main_process(PartialState(), lambda: uuid4().hex[:8])
        if have_weights(self.step, step, self.args.vllm_sync_frequency):
            return
        self.version = f"{self.run}-{step}"
        self.model_name = self.sync.renew(model, self.version)
        self.step = step

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        return self.start(prompts, sampling)()

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Callable[[], list[list[Completion]]]:
        """The answer is called on all ranks."""
        assert self.step is not None, "weights are brought over before a window's prompts"
        params = sampling_params(sampling, sampling.banned_ids(self.num_entries))
        asked = Background(lambda prompt: self._complete(prompt, params), prompts, REQUESTS)
        self.asked = asked
        tokenizer = tokenizer_of(self.collator.processor)

        def answer() -> list[list[Completion]]:
            written = on_every_rank(asked.results)
            return [
                [completion.kept(prompt, sampling, tokenizer) for completion in completions]
                for prompt, completions in zip(prompts, written, strict=True)
            ]

        return answer

    def close(self) -> None:
        self.run, self.step = "", None  # the next run counts its steps anew
        if self.asked is not None:
            self.asked.cancel()

    def _complete(self, prompt: Prompt, params: dict[str, Any]) -> list[Completion]:
        example, processor = prompt.example, self.collator.processor
        assert self.step is not None
        refuse_videos(example)
        check_room(prompt, self.info.max_model_len, "start the server with more")
        body = request_body(prompt, params, processor, self.model_name)
        try:
            answer = self.server.post(GENERATE, body)
        except Refused as error:
            pictures = [image.size for image in example.images]
            raise ValueError(
                f"{example.where}: the vLLM server at {self.server.url} must take the prompt "
                f"{example.prompt_text[:80]!r} with pictures of {pictures}, got a refusal ({error})"
                "; change the row, or how the server is started."
            ) from error
        check_expanded(answer["prompt_token_ids"], example, processor)
        return read_completions(answer, prompt, self.step, self.version)

"""Completions of a vLLM server that has the student's weights."""

from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from gold_trainer.collator import GOLDCollator, tokenizer_of
from gold_trainer.config import GOLDConfig
from gold_trainer.models import base_model
from gold_trainer.resuming import on_main_process
from gold_trainer.writers.background import Background
from gold_trainer.writers.vllm_check import ServerInfo
from gold_trainer.writers.vllm_requests import (
    GENERATE,
    check_expanded,
    read_completions,
    refuse_videos,
    request_body,
    sampling_params,
)
from gold_trainer.writers.vllm_server import Refused, Server
from gold_trainer.writers.vllm_sync import make_sync
from gold_trainer.writers.writer import Completion, Prompt, Sampling, Writer

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
        frequency = self.args.vllm_sync_frequency
        if self.step is not None and step // frequency == self.step // frequency:
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
            written: list[list[Completion]] = []
            error: Exception | None = None
            try:
                written = asked.results()
            except Exception as first:  # whatever it is, the other ranks must hear of it
                error = first
            raise_on_all(error)
            return [
                [completion.kept(prompt, sampling, tokenizer) for completion in completions]
                for prompt, completions in zip(prompts, written, strict=True)
            ]

        return answer

    def close(self) -> None:
        if self.asked is not None:
            self.asked.cancel()

    def _complete(self, prompt: Prompt, params: dict[str, Any]) -> list[Completion]:
        example, processor = prompt.example, self.collator.processor
        assert self.step is not None
        self._check(prompt)
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
        check_expanded(answer, example, processor)
        return read_completions(answer, prompt, self.step, self.version)

    def _check(self, prompt: Prompt) -> None:
        example, most = prompt.example, self.info.max_model_len
        refuse_videos(example)
        if example.prompt_length + prompt.room > most:
            raise ValueError(
                f"{example.where}: prompt and completion must fit into the vLLM server's "
                f"--max-model-len {most}, got {example.prompt_length} tokens and room for "
                f"{prompt.room}; set max_length={most}, or start the server with more."
            )


def raise_on_all(error: Exception | None) -> None:
    """The error of one rank on every rank, so that none waits for it. Called on all ranks."""
    state = PartialState()
    if state.num_processes > 1:
        told = None if error is None else f"rank {state.process_index}: {error}"
        first = next((text for text in gather_object([told]) if text is not None), None)
        if error is None and first is not None:
            raise ValueError(first)
    if error is not None:
        raise error

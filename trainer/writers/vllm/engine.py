"""Completions of a vLLM engine in each training process (vllm_mode="colocate")."""

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gold_trainer.config import GOLDConfig
from gold_trainer.models import base_model
from gold_trainer.ranks import on_every_rank
from gold_trainer.rendering.collator import GOLDCollator
from gold_trainer.rendering.prompts import tokenizer_of
from gold_trainer.writers.vllm.check import refuse_whole_of_quantised
from gold_trainer.writers.vllm.command import dtype_of, engine_options
from gold_trainer.writers.vllm.requests import (
    check_expanded,
    check_room,
    refuse_videos,
    sampling_params,
    unexpanded_ids,
)
from gold_trainer.writers.vllm.sync import sync_root, write
from gold_trainer.writers.weights import checkpoint_weights, gathered_weights
from gold_trainer.writers.writer import Completion, Prompt, Sampling, Writer, have_weights


class EngineWriter(Writer):
    """Each rank has an engine of its own, with all weights. It is made with the first window, when
    the student is where it trains.
    """

    def __init__(self, student: nn.Module, collator: GOLDCollator, args: GOLDConfig) -> None:
        refuse_whole_of_quantised(args, student)
        self.collator, self.args = collator, args
        base = base_model(student)
        self.config = copy.deepcopy(base.config)
        self.config.architectures = [type(base).__name__]
        self.engine: Any = None
        self.most = 0  # tokens of a sequence in it
        self.step: int | None = None
        self.is_asleep = False
        # what sleeps deeply has forgotten its weights: it needs new ones whenever it wakes
        self.sleep_level = 2 if args.vllm_sync_frequency == 1 else 1

    def sync_weights(self, model: nn.Module | None, step: int) -> None:
        assert model is not None, "the student is here"
        has_them = have_weights(self.step, step, self.args.vllm_sync_frequency)
        if has_them and not (self.is_asleep and self.sleep_level == 2):
            on_every_rank(self._wake)
            return
        dtype = getattr(torch, dtype_of(self.args))
        gathered = gathered_weights(model, dtype, is_merged=True, is_kept=True)
        on_every_rank(lambda: self._take(checkpoint_weights(model, gathered)))
        self.step = step

    def _take(self, weights: dict[str, Tensor]) -> None:
        """Give the engine new weights, on one rank: others have to hear of its error."""
        if self.engine is None:
            self.engine = self._make(weights)
            return
        self._wake()
        options = {"weights_iterator": list(weights.items())}
        self.engine.collective_rpc("reload_weights", kwargs=options)
        # what was computed with the old ones
        self.engine.reset_prefix_cache()
        self.engine.reset_mm_cache()
        self.engine.llm_engine.reset_encoder_cache()

    def close(self) -> None:
        self.step = None  # the next run counts its steps anew

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        """Called on all ranks, with no prompts too: the engine wakes and sleeps on all."""
        assert self.step is not None, "weights are brought over before a window's prompts"
        return on_every_rank(lambda: self._complete(prompts, sampling))

    def _complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        written = self._written(prompts, sampling) if prompts else []
        if self.args.vllm_enable_sleep_mode:
            self.engine.sleep(level=self.sleep_level)
            self.is_asleep = True
        return written

    def _written(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        from vllm import SamplingParams

        assert self.step is not None
        processor = self.collator.processor
        banned = sampling.banned_ids(self.config.get_text_config().vocab_size)
        params = sampling_params(sampling, banned)
        asked, options = [], []
        for prompt in prompts:
            refuse_videos(prompt.example)
            check_room(prompt, self.most, "set vllm_max_model_length to more")
            ids: dict[str, Any] = {"prompt_token_ids": unexpanded_ids(processor, prompt.example)}
            if prompt.example.images:
                ids["multi_modal_data"] = {"image": prompt.example.images}
            asked.append(ids)
            numbers = {"n": prompt.num_completions, "max_tokens": prompt.room, "seed": prompt.seed}
            options.append(SamplingParams(**params, **numbers))
        outputs = self.engine.generate(asked, options, use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            check_expanded(output.prompt_token_ids, prompt.example, processor)
        tokenizer = tokenizer_of(processor)
        return [
            [_completion(c, self.step).kept(prompt, sampling, tokenizer) for c in output.outputs]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def _wake(self) -> None:
        if self.is_asleep:
            self.engine.wake_up()
            self.is_asleep = False

    def _make(self, weights: dict[str, Tensor]) -> Any:
        """Make the engine from files, as any model: one without weights makes up what is in none,
        such as the means that pictures are normalised with.
        """
        # the scheduler in this process too: its memory is freed with the engine's
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        options = engine_options(self.args)
        if self.args.world_size > 1:  # torchrun has started the processes
            options["distributed_executor_backend"] = "external_launcher"
        remedy = "set TMPDIR to a folder with more, and leave more of /dev/shm free"
        with write(weights, sync_root(self.args), remedy=remedy) as folder:
            self.config.save_pretrained(folder)
            self.collator.processor.save_pretrained(folder)
            engine = LLM(model=folder, **options)
        self.most = engine.llm_engine.model_config.max_model_len
        return engine


def _completion(output: Any, step: int) -> Completion:
    ids = list(output.token_ids)
    logprobs = [place[i].logprob for i, place in zip(ids, output.logprobs, strict=True)]
    return Completion(ids, logprobs, step)

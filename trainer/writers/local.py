"""Completions of a model in this process, sampled with transformers' generate()."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gold_trainer import sharding
from gold_trainer.collator import GOLDCollator, process_examples
from gold_trainer.config import GOLDConfig
from gold_trainer.models import base_model, may_pad_left
from gold_trainer.writers.sampling import NEVER, Sampler
from gold_trainer.writers.writer import Completion, Prompt, Sampling, Writer


class LocalWriter(Writer):
    """generate() of the model itself: there is no copy of the weights to renew."""

    def __init__(
        self,
        writing: Callable[[], AbstractContextManager[nn.Module]],  # the model, ready to write
        collator: GOLDCollator,  # of the side whose prompts these are
        args: GOLDConfig,
    ) -> None:
        self.writing, self.collator, self.args = writing, collator, args
        self.version = 0

    def sync_weights(self, model: nn.Module | None, step: int) -> None:
        self.version = step

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Completion]]:
        rows = [replace(p, seed=seed, num_completions=1) for p in prompts for seed in p.seeds]
        completed: dict[int, Completion] = {}
        with self.writing() as model:
            groups = [list(range(len(rows)))]
            if not may_pad_left(model):
                lengths = [row.example.prompt_length for row in rows]
                groups = [
                    [i for i, other in enumerate(lengths) if other == length]
                    for length in dict.fromkeys(lengths)
                ]
            for number in range(sharding.num_calls(model, len(groups), self.args.device)):
                # a rank that has written all writes again, and drops it
                group = groups[number % len(groups)]
                written = self.write_rows(model, [rows[i] for i in group], sampling)
                completed = dict(zip(group, written, strict=True)) | completed
        tokenizer = self.collator.tokenizer
        in_order = (completed[i].kept(row, sampling, tokenizer) for i, row in enumerate(rows))
        return [list(islice(in_order, prompt.num_completions)) for prompt in prompts]

    def write_rows(
        self,
        model: nn.Module,
        rows: Sequence[Prompt],  # of one completion each, with prompts that may be padded together
        sampling: Sampling,
    ) -> list[Completion]:
        """With whatever the batch has behind a row's end."""
        processor = self.collator.processor
        inputs = process_examples(processor, [row.example for row in rows])
        inputs = {name: tensor.to(self.args.device) for name, tensor in inputs.items()}
        ids, logprobs = generate(model, inputs, rows, sampling, self.collator.tokenizer)
        pairs = zip(ids.tolist(), logprobs.tolist(), strict=True)
        return [Completion(*pair, self.version) for pair in pairs]


@contextmanager
def generation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, restored after. Gradient checkpointing, which would switch the cache off, acts
    in training mode only.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def head_in_its_dtype(model: PreTrainedModel) -> Iterator[None]:
    """A float32 head over 16-bit weights takes their hidden states, as the loss has it."""
    head = model.get_output_embeddings()

    def cast(_head: nn.Module, hidden: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(hidden[0].dtype, head.weight.dtype)
        return (hidden[0].to(dtype), *hidden[1:])

    hook = head.register_forward_pre_hook(cast)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def own_settings_hidden(model: PreTrainedModel) -> Iterator[None]:
    """Without the generation_config that came with the weights: generate() takes from it whatever
    the caller leaves open, for instance a repetition penalty.
    """
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


class RowSampler(LogitsProcessor):
    """Leaves of each row's scores the token that it has drawn, and keeps its log-probability."""

    def __init__(self, sampler: Sampler, width: int) -> None:
        self.sampler, self.width = sampler, width
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = self.sampler.draws[:, input_ids.shape[1] - self.width]
        ids, logprobs = self.sampler(scores, draws)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, NEVER).scatter_(1, ids[:, None], 0.0)


def generate(
    model: nn.Module,
    inputs: dict[str, Tensor],  # of rows, padded on the left
    rows: Sequence[Prompt],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Tensor, Tensor]:  # (B, R) ids with whatever stands behind an end, (B, R)
    """generate() of the model, with a sampler of ours."""
    base = base_model(model)
    ids, room = inputs["input_ids"], max(row.room for row in rows)
    num_entries = base.get_output_embeddings().out_features
    sampler = Sampler(sampling, [row.seed for row in rows], room, num_entries, ids.device)
    sampler.see(ids, inputs["attention_mask"])
    processor = RowSampler(sampler, ids.shape[1])
    stops = {"stop_strings": list(sampling.stop_strings)} if sampling.stop_strings else {}
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=room,
        eos_token_id=list(sampling.end_ids),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **stops,
        **sampling.generation_kwargs,
    )
    with generation_mode(base), own_settings_hidden(base), head_in_its_dtype(base):
        options: dict[str, Any] = {**inputs, "tokenizer": tokenizer} if stops else {**inputs}
        options |= {"generation_config": config}
        options |= {"logits_processor": LogitsProcessorList([processor])}
        output = sharding.generate(model, base, **options)
    sampled = output[:, ids.shape[1] :]
    return sampled, torch.stack(processor.logprobs, dim=1)[:, : sampled.shape[1]]

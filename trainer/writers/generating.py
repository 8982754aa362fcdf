"""transformers' generate() with a sampler of ours: for models that keep no plain cache.

B rows, R most new tokens of a row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from gold_trainer.models import base_model
from gold_trainer.writers.sampling import NEVER, Sampler
from gold_trainer.writers.writer import Prompt, Sampling


@contextmanager
def writing_mode(model: PreTrainedModel) -> Iterator[None]:
    """Whatever the model was set to for training, and came with: put aside until the end."""
    with generation_mode(model), own_settings_hidden(model), head_in_its_dtype(model):
        yield


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
    """Within it the generation_config that came with the weights is hidden: generate() takes from
    it whatever the caller leaves open, for instance a repetition penalty.
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
        count = torch.tensor([input_ids.shape[1] - self.width], device=scores.device)
        ids, logprobs = self.sampler(scores, count)
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
    device = base.get_input_embeddings().weight.device
    if device.type != "meta":  # pictures go into a teacher on another device before its forward()
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    ids, room = inputs["input_ids"], max(row.room for row in rows)
    num_entries = base.get_output_embeddings().out_features
    sampler = Sampler(sampling, [row.seed for row in rows], room, num_entries, ids.device)
    sampler.see(0, ids, inputs["attention_mask"])
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
    with writing_mode(base):
        options: dict[str, Any] = {**inputs, "tokenizer": tokenizer} if stops else {**inputs}
        options |= {"generation_config": config}
        options |= {"logits_processor": LogitsProcessorList([processor])}
        output = sharding.generate(model, base, **options)
    sampled = output[:, ids.shape[1] :]
    return sampled, torch.stack(processor.logprobs, dim=1)[:, : sampled.shape[1]]

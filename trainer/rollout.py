"""Completions sampled from the student (on-policy) or the teacher (seq_kd) with local generate."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from gold_trainer.collator import (
    Example,
    Processor,
    process_prompts,
    tokenizer_of,
    until_end,
)
from gold_trainer.config import GOLDConfig
from gold_trainer.models import base_model


def end_ids_of(model: nn.Module, processor: Processor) -> list[int]:
    """Tokens that end a generation: the model's own and the tokenizer's."""
    ids = base_model(model).generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return sorted({*ids, tokenizer_of(processor).eos_token_id})


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
def own_settings_hidden(model: PreTrainedModel) -> Iterator[None]:
    """Without the generation_config that came with the weights: generate() takes from it whatever
    the caller leaves open, for instance a repetition penalty.
    """
    settings, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from this seed, the state before restored after.

    Rollouts must not depend on what was drawn before them: the Trainer restores the random state
    of a checkpoint only after the resumed window's batches were fetched.
    """
    is_forked = device.type not in ("cpu", "mps")  # those have one generator, or none by device
    options = {"devices": [device], "device_type": device.type} if is_forked else {"devices": []}
    with torch.random.fork_rng(**options):
        torch.manual_seed(seed)
        yield


def generate_completions(
    model: PreTrainedModel,
    processor: Processor,
    examples: Sequence[Example],
    end_ids: Sequence[int],
    token_ids: Collection[int],  # that may be sampled
    args: GOLDConfig,
    seed: int,
) -> list[Example]:
    """The examples with completions as they were sampled: the end token kept, padding dropped.

    A completion that reaches max_completion_length (or the row's room in max_length) has no end.
    """
    tokenizer, model = tokenizer_of(processor), base_model(model)
    num_entries = model.get_output_embeddings().weight.shape[0]
    never = [i for i in range(num_entries) if i not in token_ids]
    rooms = [
        args.max_completion_length
        if args.max_length is None
        else min(args.max_completion_length, args.max_length - example.prompt_length)
        for example in examples
    ]
    config = GenerationConfig(
        do_sample=True,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_new_tokens=max(rooms),
        eos_token_id=list(end_ids),
        suppress_tokens=never or None,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    inputs = process_prompts(
        processor, [e.prompt_text for e in examples], [e.images for e in examples]
    )
    inputs = {name: tensor.to(args.device) for name, tensor in inputs.items()}
    with generation_mode(model), own_settings_hidden(model), seeded(seed, args.device):
        output = model.generate(**inputs, generation_config=config)
    sampled = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [
        example.with_completion(until_end(ids[:room], end_ids))
        for example, ids, room in zip(examples, sampled, rooms, strict=True)
    ]

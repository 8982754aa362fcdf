"""Completions sampled from the student (on-policy) or the teacher (seq_kd) with local generate."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from trainer.collator import Example, Processor, process_prompts, tokenizer_of
from trainer.config import GOLDConfig
from trainer.models import base_model


def end_ids_of(model: nn.Module, processor: Processor) -> list[int]:
    """Tokens that end a generation: the model's own and the tokenizer's."""
    ids = base_model(model).generation_config.eos_token_id
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return sorted({*ids, tokenizer_of(processor).eos_token_id})


@contextmanager
def generation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode without gradient checkpointing, which would switch the cache off; restored
    after.
    """
    was_training = model.training
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in checkpointed:
        module.gradient_checkpointing = False
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for module in checkpointed:
            module.gradient_checkpointing = True


def generate_completions(
    model: PreTrainedModel,
    processor: Processor,
    examples: Sequence[Example],
    end_ids: Sequence[int],
    placeholder_ids: Sequence[int],
    args: GOLDConfig,
) -> list[Example]:
    """The examples with completions as they were sampled: the end token kept, padding dropped.

    Placeholders of pictures are never sampled. A completion that reaches max_completion_length (or
    the row's room in max_length) has no end.
    """
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
        suppress_tokens=list(placeholder_ids) or None,
        pad_token_id=tokenizer_of(processor).pad_token_id,
        use_cache=True,
    )
    inputs = process_prompts(
        processor, [e.prompt_text for e in examples], [e.images for e in examples]
    )
    inputs = {name: tensor.to(args.device) for name, tensor in inputs.items()}
    with generation_mode(model), torch.no_grad():
        output = model.generate(**inputs, generation_config=config)
    sampled = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [
        example.with_completion(until_end(ids[:room], end_ids))
        for example, ids, room in zip(examples, sampled, rooms, strict=True)
    ]


def until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """Ids up to and with the first end token."""
    end = next((i for i, token_id in enumerate(ids) if token_id in end_ids), None)
    return ids if end is None else ids[: end + 1]

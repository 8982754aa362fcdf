"""Completions of a model in this process, sampled with transformers' generate()."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from gold_trainer import sharding
from gold_trainer.batches import Example
from gold_trainer.collator import (
    GOLDCollator,
    Processor,
    process_examples,
    token_ids_of,
    tokenizer_of,
    until_end,
)
from gold_trainer.config import GOLDConfig
from gold_trainer.models import base_model, may_pad_left
from gold_trainer.writers.writer import Writer


class LocalWriter(Writer):
    """generate() of the model itself: there is no copy of the weights to renew."""

    def __init__(
        self,
        writing: Callable[[], AbstractContextManager[nn.Module]],  # the model, ready to write
        collator: GOLDCollator,  # of the side whose prompts these are
        args: GOLDConfig,
    ) -> None:
        self.writing, self.collator, self.args = writing, collator, args

    @cached_property
    def token_ids(self) -> frozenset[int]:
        """What may be written: no placeholders of pictures, and no rows of a head that are no
        token.
        """
        return frozenset(token_ids_of(self.collator.processor) - self.collator.placeholder_ids)

    def sync_weights(self, step: int) -> None:
        pass

    def complete(self, examples: Sequence[Example], seed: int) -> list[Example]:
        completed: dict[int, Example] = {}
        with self.writing() as model:
            groups = [list(range(len(examples)))]
            if not may_pad_left(model):
                lengths = [example.prompt_length for example in examples]
                groups = [
                    [i for i, other in enumerate(lengths) if other == length]
                    for length in dict.fromkeys(lengths)
                ]
            for number in range(sharding.num_calls(model, len(groups), self.args.device)):
                # a rank that has written all writes again, and drops it
                group = groups[number % len(groups)]
                written = generate_completions(
                    model,
                    self.collator.processor,
                    [examples[i] for i in group],
                    sorted(self.collator.end_ids),
                    self.token_ids,
                    self.args,
                    seed + number,
                )
                completed = dict(zip(group, written, strict=True)) | completed
        return [completed[i] for i in range(len(examples))]


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
    model: nn.Module,
    processor: Processor,
    examples: Sequence[Example],
    end_ids: Sequence[int],
    token_ids: Collection[int],  # that may be sampled
    args: GOLDConfig,
    seed: int,
) -> list[Example]:
    """See Writer.complete."""
    tokenizer, base = tokenizer_of(processor), base_model(model)
    num_entries = base.get_output_embeddings().out_features
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
    inputs = process_examples(processor, examples)
    inputs = {name: tensor.to(args.device) for name, tensor in inputs.items()}
    with (
        generation_mode(base),
        own_settings_hidden(base),
        head_in_its_dtype(base),
        seeded(seed, args.device),
    ):
        output = sharding.generate(model, base, **inputs, generation_config=config)
    sampled = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [
        example.with_completion(until_end(ids[:room], end_ids))
        for example, ids, room in zip(examples, sampled, rooms, strict=True)
    ]

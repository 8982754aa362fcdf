"""Tensors with a place for each token of the text. They are known by name, never by shape: one row
of 1,024 patches has the shape of one row of 1,024 tokens.

B sequences, L positions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import MllamaProcessor, PaliGemmaProcessor

from gold_trainer.rendering.renderer import Processor


class Places(NamedTuple):
    """What a tensor holds where the answer stands; padding holds 0. None: what the last token of
    the prompt has, as generate() has it.
    """

    answer: int | None


PLACES = {
    "input_ids": Places(0),  # overwritten
    "attention_mask": Places(1),
    "token_type_ids": Places(0),
    "mm_token_type_ids": Places(0),
    "moe_mm_token_type_ids": Places(0),
    "image_embeds_position_mask": Places(0),  # Kosmos
    "cross_attention_mask": Places(None),  # (B, L, pictures, tiles) of Llama 3.2 Vision
    "image_attention_mask": Places(None),  # (B, L, pictures) of IDEFICS
}
# What a processor makes for its own training, from labels of a suffix that it does not get here.
NOT_INPUTS = ("labels",)


def places_of(processor: Processor, name: str) -> Places | None:
    """None: the tensor has no place for each token."""
    if name == "token_type_ids" and isinstance(processor, PaliGemmaProcessor):
        return Places(1)  # 0 is its prefix, every token of which sees all others
    return PLACES.get(name)


def pictures_first(processor: Processor, images: Sequence[Sequence[Any]]) -> list[int]:
    """The order of rows that a processor takes: Llama 3.2 Vision's wants a picture in the first."""
    order = list(range(len(images)))
    if isinstance(processor, MllamaProcessor) and any(images):
        order.sort(key=lambda i: not images[i])
    return order


def with_all_rows(
    inputs: dict[str, Tensor], has_pictures: list[bool]
) -> dict[str, Tensor]:  # aspect_ratio_* (B, pictures, ...)
    """Llama 3.2 Vision's processor leaves rows without pictures out of two of its tensors; they get
    what it gives a picture that a row has less than another: id 0, and the first tile.
    """
    result = dict(inputs)
    for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
        if name in inputs and len(inputs[name]) < len(has_pictures):
            rows = inputs[name].new_zeros(len(has_pictures), *inputs[name].shape[1:])
            if rows.ndim == 3:
                rows[:, :, 0] = 1
            rows[torch.tensor(has_pictures)] = inputs[name]
            result[name] = rows
    return result


def cut(
    processor: Processor,
    inputs: dict[str, Tensor],  # of prompts, padded on the left
    most: Sequence[int | None],  # last tokens that are kept of each; None: all
    pad: int,
) -> dict[str, Tensor]:
    shape = inputs["input_ids"].shape
    texts = {name for name in inputs if places_of(processor, name) is not None}
    lengths = inputs["attention_mask"].sum(1).tolist()
    for b, limit in enumerate(most):
        if limit is not None:
            lengths[b] = min(lengths[b], limit)
            for name in texts:
                inputs[name][b, : shape[1] - lengths[b]] = pad if name == "input_ids" else 0
    return {n: t[:, shape[1] - max(lengths) :] if n in texts else t for n, t in inputs.items()}


def extended(
    prompts: Tensor,  # (B, L_p, ...), padded on the left
    prompt_lengths: list[int],
    lengths: list[int],  # with answers
    pad: int,
    answer: int | None,
) -> Tensor:  # (B, max(lengths), ...), padded on the right
    tensor = prompts.new_full((len(lengths), max(lengths), *prompts.shape[2:]), pad)
    for b, (first, last) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        tensor[b, :first] = prompts[b, prompts.shape[1] - first :]
        tensor[b, first:last] = prompts[b, -1] if answer is None else answer
    return tensor

"""Prompts -> token ids, and tensors padded on the left: what a processor makes of texts,
pictures and videos.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from gold_trainer.batches import Example
from gold_trainer.data.videos import Video, processor_videos
from gold_trainer.quiet import quiet
from gold_trainer.rendering import text_tensors
from gold_trainer.rendering.renderer import Processor

# They say that a device other than the CPU resizes differently; the rows' own pass says the rest.
WARN_OF_SHAPES = (
    *("transformers.image_processing_backends", "transformers.video_processing_utils"),
    *("transformers.processing_utils", "transformers.tokenization_utils_base"),
)


def tokenizer_of(processor: Processor) -> PreTrainedTokenizerBase:
    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


def token_ids_of(processor: Processor) -> set[int]:
    """Not range(len(tokenizer)): the ids of some tokenizers have holes."""
    return set(tokenizer_of(processor).get_vocab().values())


def prompt_ids(
    processor: Processor,
    text: str,
    images: list[Image.Image],
    adds_special_tokens: bool | None = None,  # see process_prompts
    videos: Sequence[Video] = (),
) -> list[int]:
    """Tokens of a prompt, those of pictures and videos included.

    Pictures without pixels stand in: processors count image tokens from sizes alone, which takes
    2 ms instead of 90 for a 448x448 picture of Qwen3-VL. Where one reads pixels (LLaVA's does), it
    gets the pictures.
    """
    shapes = [torch.empty(3, i.height, i.width, dtype=torch.uint8, device="meta") for i in images]
    with quiet(*WARN_OF_SHAPES):
        try:
            options = processor_videos(processor, [videos], is_for_length=True)
            inputs = process_prompts(processor, [text], [shapes], [adds_special_tokens], options)
        except (RuntimeError, TypeError):  # torch's answers to reading a meta tensor
            options = processor_videos(processor, [videos])
            inputs = process_prompts(processor, [text], [images], [adds_special_tokens], options)
    return inputs["input_ids"][0].tolist()


def text_ids(processor: Processor, text: str, adds_special_tokens: bool | None) -> list[int]:
    """Ids of the text as it is, with one placeholder a picture. Padding, of which one text has
    none, is as in process_prompts: a tokenizer keeps it, and another thread may ask it for a batch.
    """
    tokenizer = tokenizer_of(processor)
    adds = not has_bos(tokenizer, text) if adds_special_tokens is None else adds_special_tokens
    inputs = tokenizer(text, padding=True, padding_side="left", add_special_tokens=adds)
    return inputs["input_ids"]


def process_prompts(
    processor: Processor,
    texts: list[str],
    images: list[list[Image.Image]] | list[list[Tensor]],
    adds_special_tokens: Sequence[bool | None] | None = None,  # of each text; None: unless it has
    video_options: Mapping[str, Any] | None = None,  # see processor_videos
) -> dict[str, Tensor]:
    """Left-padded inputs of prompts with their pictures, as generation needs them."""
    tokenizer = tokenizer_of(processor)
    flags = [None] * len(texts) if adds_special_tokens is None else adds_special_tokens
    adds = [
        not has_bos(tokenizer, text) if flag is None else flag
        for text, flag in zip(texts, flags, strict=True)
    ]
    if len(set(adds)) > 1 and processor is tokenizer:
        # conversations beside plain text, to which the tokenizer adds its own
        ids = [text_ids(processor, text, flag) for text, flag in zip(texts, adds, strict=True)]
        batch = {"input_ids": ids}
        return dict(processor.pad(batch, padding_side="left", return_tensors="pt"))
    options: dict[str, Any] = {"images": images} if any(images) else {}
    order = text_tensors.pictures_first(processor, images)
    if order != sorted(order):
        pictures: Any = images
        ordered = process_prompts(
            processor,
            [texts[i] for i in order],
            [pictures[i] for i in order],
            [flags[i] for i in order],
        )
        places = [order.index(i) for i in range(len(order))]
        return {name: tensor[places] for name, tensor in ordered.items()}
    inputs = processor(
        text=texts,
        padding=True,
        padding_side="left",
        add_special_tokens=adds[0],
        return_tensors="pt",
        **options,
        **(video_options or {}),
    )
    tensors = {name: t for name, t in inputs.items() if name not in text_tensors.NOT_INPUTS}
    return text_tensors.with_all_rows(tensors, [bool(row) for row in images])


def process_examples(processor: Processor, examples: Sequence[Example]) -> dict[str, Tensor]:
    """process_prompts of examples with their pictures and videos; of a prompt that is cut its last
    tokens alone.
    """
    inputs = process_prompts(
        processor,
        [e.prompt_text for e in examples],
        [e.images for e in examples],
        [e.adds_special_tokens for e in examples],
        processor_videos(processor, [e.videos for e in examples]),
    )
    if not any(example.is_cut for example in examples):
        return inputs
    lengths = [example.prompt_length if example.is_cut else None for example in examples]
    return text_tensors.cut(processor, inputs, lengths, tokenizer_of(processor).pad_token_id)


def has_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)

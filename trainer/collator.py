"""Rows -> examples (in data loader workers) -> model inputs of one micro-batch.

B sequences, L positions, N scored rows. An example knows its completion's token ids before any
picture becomes a tensor, so the scored tokens of a whole accumulation window are counted first;
pictures stay raw until the micro-batch that needs them. Off-policy rows and rollouts take one path:
a completion is a list of token ids, tokenised by itself as it is at generation time.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from gold_trainer.batches import Example, ModelInputs, SideInputs, WindowBatch
from gold_trainer.dataset import Messages, Row

IGNORE_INDEX = -100
Processor = ProcessorMixin | PreTrainedTokenizerBase


def tokenizer_of(processor: Processor) -> PreTrainedTokenizerBase:
    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


def token_ids_of(processor: Processor) -> set[int]:
    """Not range(len(tokenizer)): the ids of some tokenizers have holes."""
    return set(tokenizer_of(processor).get_vocab().values())


class GOLDCollator:
    """Renders rows with the processor's chat template and tokenises their completions."""

    def __init__(
        self,
        processor: Processor,
        end_ids: Sequence[int],
        max_length: int | None,
        placeholder_ids: Sequence[int] = (),
    ):
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self.is_vlm = isinstance(processor, ProcessorMixin)
        self.end_ids = frozenset(end_ids)  # end of turn and end of text: any of them ends an answer
        self.max_length = max_length
        self.placeholder_ids = frozenset(placeholder_ids)  # of pictures: not in a completion

    def __call__(self, rows: list[Row]) -> WindowBatch:
        examples = [self.example(row) for row in rows]
        return WindowBatch(examples, examples)

    def example(self, row: Row) -> Example:
        prompt_text, completion_text = self._render(row)
        try:
            length = prompt_length(self.processor, prompt_text, row.images)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"row {row.index}: the processor refuses the prompt {prompt_text[:80]!r} with "
                f"{len(row.images)} pictures ({error}); look for a picture's placeholder written "
                "into the text."
            ) from error
        if length == 0:
            raise ValueError(
                f"row {row.index}: a prompt must have at least one token, got {prompt_text!r}, "
                "after which nothing predicts the completion; drop the row or give it a prompt."
            )
        room = None if self.max_length is None else self.max_length - length
        if room is not None and room < 1:
            raise ValueError(
                f"row {row.index}: the prompt has {length} tokens with {len(row.images)} pictures, "
                f"max_length={self.max_length} leaves no room for a completion; raise max_length "
                "or make the pictures smaller."
            )
        if completion_text is None:
            return Example(row.index, prompt_text, length, row.images, None)
        ids = self._completion_ids(completion_text)[:room]
        if not self.placeholder_ids.isdisjoint(ids):
            raise ValueError(
                f"row {row.index}: a completion must be text, got a picture's placeholder in "
                f"{completion_text[:80]!r}; remove it from the answer."
            )
        return Example(row.index, prompt_text, length, row.images, ids)

    def _completion_ids(self, text: str) -> list[int]:
        """Up to the first end token, which is added where the text has none."""
        ids = until_end(self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_ids)
        return ids if ids and ids[-1] in self.end_ids else [*ids, self.tokenizer.eos_token_id]

    def _render(self, row: Row) -> tuple[str, str | None]:
        """Prompt text as the model is prompted, and the text that follows it."""
        if isinstance(row.prompt, str):
            return row.prompt, row.completion
        if self.processor.chat_template is None:
            raise ValueError(
                f"row {row.index}: a conversation needs a chat template, "
                f"{type(self.processor).__name__} has none; set its chat_template, or pass prompt "
                "and completion as plain text."
            )
        prompt = self._template(row, row.prompt, add_generation_prompt=True)
        if row.completion is None:
            return prompt, None
        answer = {"role": "assistant", "content": row.completion}
        conversation = self._template(row, [*row.prompt, answer], add_generation_prompt=False)
        if not conversation.startswith(prompt):
            raise ValueError(
                f"row {row.index}: the chat template must render an answered conversation as the "
                f"prompt plus the answer, got {conversation[-80:]!r} after {prompt[-40:]!r}; pass "
                "prompt and completion as plain text, or a processor with another template."
            )
        return prompt, conversation[len(prompt) :]

    def _template(self, row: Row, messages: Messages, *, add_generation_prompt: bool) -> str:
        try:
            text = self.processor.apply_chat_template(
                [{**message, "content": self._content(message["content"])} for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except Exception as error:  # templates raise errors of jinja2, which is not a dependency
            raise ValueError(
                f"row {row.index}: the chat template must take the conversation, got an error for "
                f"the turns {[message['role'] for message in messages]} ({error}); change the row, "
                "or pass a processor with another template."
            ) from error
        assert isinstance(text, str), "apply_chat_template tokenizes only where it is asked to"
        return text

    def _content(self, content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        """Lists of parts for processors, strings for tokenizers: what their templates expect."""
        if self.is_vlm:
            return [{"type": "text", "text": content}] if isinstance(content, str) else content
        return content if isinstance(content, str) else "".join(part["text"] for part in content)


def until_end(ids: list[int], end_ids: Collection[int]) -> list[int]:
    """Ids up to and with the first end token."""
    end = next((i for i, token_id in enumerate(ids) if token_id in end_ids), None)
    return ids if end is None else ids[: end + 1]


def prompt_length(processor: Processor, text: str, images: list[Image.Image]) -> int:
    """Tokens of a prompt, image tokens included.

    Pictures without pixels stand in: processors count image tokens from sizes alone, which takes
    2 ms instead of 90 for a 448x448 picture of Qwen3-VL. Where one reads pixels (LLaVA's does), it
    gets the pictures.
    """
    shapes = [torch.empty(3, i.height, i.width, dtype=torch.uint8, device="meta") for i in images]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # some warn that a device other than the CPU resizes differently
    try:
        inputs = process_prompts(processor, [text], [shapes])
    except (RuntimeError, TypeError):  # torch's answers to reading a meta tensor
        inputs = process_prompts(processor, [text], [images])
    finally:
        logging.set_verbosity(verbosity)
    return inputs["input_ids"].shape[1]


def process_prompts(
    processor: Processor, texts: list[str], images: list[list[Image.Image]] | list[list[Tensor]]
) -> dict[str, Tensor]:
    """Left-padded inputs of prompts with their pictures, as generation needs them."""
    bos = tokenizer_of(processor).bos_token
    has_bos = [bos is not None and text.startswith(bos) for text in texts]
    if len(set(has_bos)) > 1 and processor is tokenizer_of(processor):
        # conversations beside plain text, to which the tokenizer adds its own
        ids = [
            processor(text, add_special_tokens=not has)["input_ids"]
            for text, has in zip(texts, has_bos, strict=True)
        ]
        batch = {"input_ids": ids}
        return dict(processor.pad(batch, padding_side="left", return_tensors="pt"))
    options: dict[str, Any] = {"images": images} if any(images) else {}
    return dict(
        processor(
            text=texts,
            padding=True,
            padding_side="left",
            add_special_tokens=not has_bos[0],  # templates write their own
            return_tensors="pt",
            **options,
        )
    )


def build_inputs(processor: Processor, examples: Sequence[Example]) -> ModelInputs:
    """Prompts, pictures and completions of a micro-batch, padded to the tokenizer's side.

    Every tensor of the shape of input_ids is extended over the completion (0 for type ids); others
    (pixel values and their sizes) pass through.
    """
    tokenizer = tokenizer_of(processor)
    prompts = process_prompts(
        processor, [e.prompt_text for e in examples], [e.images for e in examples]
    )
    shape = prompts["input_ids"].shape
    prompt_lengths = prompts["attention_mask"].sum(1).tolist()
    lengths = [p + len(e.written_ids) for p, e in zip(prompt_lengths, examples, strict=True)]
    width, is_left = max(lengths), tokenizer.padding_side == "left"
    starts = [width - length if is_left else 0 for length in lengths]

    tensors: dict[str, Tensor] = {}
    labels = torch.full((len(examples), width), IGNORE_INDEX)
    for name, tensor in prompts.items():
        if tensor.shape != shape:
            tensors[name] = tensor
            continue
        fill = tokenizer.pad_token_id if name == "input_ids" else 0
        tensors[name] = tensor.new_full((len(examples), width), fill)
        for b, length in enumerate(prompt_lengths):
            tensors[name][b, starts[b] : starts[b] + length] = tensor[b, shape[1] - length :]
    scored = []
    for b, example in enumerate(examples):
        first = starts[b] + prompt_lengths[b]
        completion = slice(first, first + len(example.written_ids))
        labels[b, completion] = torch.tensor(example.written_ids, dtype=torch.int64)
        tensors["input_ids"][b, completion] = labels[b, completion]
        tensors["attention_mask"][b, completion] = 1
        # The causal shift, the only one: position l - 1 predicts the token at l.
        scored.append(torch.arange(completion.start, completion.stop) + (b * width - 1))
    return ModelInputs(tensors, labels, torch.cat(scored))


def build_side(
    processor: Processor, examples: list[Example], to_device: Callable[[Tensor], Tensor]
) -> SideInputs:
    """build_inputs on the device, with the labels of the scored rows only."""
    inputs = build_inputs(processor, examples)
    return SideInputs(
        examples,
        {name: to_device(tensor) for name, tensor in inputs.tensors.items()},
        to_device(inputs.scored_rows),
        to_device(inputs.labels.flatten()[inputs.scored_rows + 1]),
    )

"""Rows -> examples (in data loader workers) -> model inputs of one micro-batch.

B sequences, L positions, N scored rows. An example knows its completion's token ids before any
picture becomes a tensor, so the scored tokens of a whole accumulation window are counted first;
pictures stay raw until the micro-batch that needs them. Off-policy rows and rollouts take one path:
a completion is a list of token ids, those that it has behind its prompt.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from gold_kernels.tokens.token_bytes import template_end_of_turn
from gold_trainer.batches import Example, ModelInputs, SideInputs, WindowBatch
from gold_trainer.data.row_errors import LongPromptError, PictureError, told
from gold_trainer.data.rows import Row
from gold_trainer.data.videos import describe_videos, refuse_videos
from gold_trainer.privileged.sides import batch_of
from gold_trainer.rendering import text_tensors
from gold_trainer.rendering.frames import CONTENT, Piece
from gold_trainer.rendering.in_context import InContext, end_ids_of_calls
from gold_trainer.rendering.lost_parts import (
    refuse_cut_text,
    refuse_lost_turns,
    refuse_unread_turns,
    warn_of_unread_keys,
)
from gold_trainer.rendering.placeholders import (
    placeholder_names,
    refuse_placeholders,
    refuse_places_elsewhere,
)
from gold_trainer.rendering.prompts import has_bos, process_examples, prompt_ids, tokenizer_of
from gold_trainer.rendering.renderer import Processor, Renderer
from gold_trainer.speed.shared_prompts import scored_places, trunks_of

IGNORE_INDEX = -100


class GOLDCollator:
    """Renders rows with the processor's chat template and tokenises their completions.

    It takes Rows of the trainer's dataset and returns a WindowBatch: the examples of a micro-batch,
    whose tensors are made later. end_ids end an answer, beside the template's own. A completion is
    cut so that it has max_length tokens with its prompt. placeholder_ids are those of pictures,
    which no text may hold. GOLDTrainer makes one itself, or takes yours as data_collator.
    """

    def __init__(
        self,
        processor: Processor,
        end_ids: Sequence[int],
        max_length: int | None,
        placeholder_ids: Sequence[int] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,  # a row's own win
        cut_to: int | None = None,  # last tokens that are kept of a prompt without room; None: none
    ):
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self.is_vlm = isinstance(processor, ProcessorMixin)
        self.renderer = Renderer(processor, chat_template_kwargs or {})
        tokenizer = tokenizer_with_template(processor)
        end_of_turn_id, writes_end = self._end_of_turn(tokenizer)
        # End of turn and end of text: any of them ends an answer. A base model's own end of text
        # is not what a template ends a turn with.
        of_calls = end_ids_of_calls(tokenizer) if writes_end else ()
        self.end_ids = frozenset((*end_ids, end_of_turn_id, *of_calls))
        self.in_context = InContext(
            self.tokenizer, self.end_ids, end_of_turn_id, writes_end=writes_end
        )
        self.max_length, self.cut_to = max_length, cut_to
        self.placeholder_ids = frozenset(placeholder_ids)  # of pictures: not in a text
        self.placeholders = placeholder_names(processor, placeholder_ids)

    def _end_of_turn(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, bool]:
        """And whether the template writes it."""
        try:
            end_of_turn_id = template_end_of_turn(tokenizer)
        except ValueError:  # a template that refuses a question and its answer refuses rows by name
            end_of_turn_id = None
        if end_of_turn_id is not None:
            return end_of_turn_id, True
        assert tokenizer.eos_token_id is not None, "a processor without eos was refused"
        return tokenizer.eos_token_id, False

    def __call__(self, rows: list[Row]) -> WindowBatch:
        return batch_of(self, rows, [self.example(row) for row in rows])

    def blank(self, index: int) -> WindowBatch:
        """A micro-batch of which no row is left: nothing in it is scored."""
        examples = [self.blank_example(index)]
        return WindowBatch(examples, examples)

    def blank_example(self, index: int) -> Example:
        text = str(self.tokenizer.eos_token)
        return Example(index, text, 1, [], [], adds_special_tokens=False, is_blank=True)

    def example(self, row: Row) -> Example:
        template = self.processor.chat_template
        if not isinstance(row.prompt, str) and template is not None:
            refuse_unread_turns(row, template)
        if isinstance(row.prompt, str):
            prompt = row.prompt
            pieces = None if row.completion is None else [Piece(row.completion, True, CONTENT)]
        elif row.completion is None:
            prompt, pieces = self.renderer.prompt(row), None
        else:
            answer = row.answer or {"role": "assistant", "content": row.completion}
            prompt, pieces = self.renderer.answered(row, answer)
        if not isinstance(row.prompt, str):
            refuse_lost_turns(row, prompt, self.renderer.prompt)
            warn_of_unread_keys(row, template, self.renderer.template_kwargs)
        refuse_videos(self.processor, len(row.videos), row.where)
        has_special = self._adds_special_tokens(row, prompt)
        length, is_cut = self._prompt_length(row, prompt, has_special)
        refuse_placeholders(row, self.placeholders)
        refuse_places_elsewhere(row)
        example = Example(
            *(row.index, prompt, length, row.images, None, has_special),
            videos=row.videos,
            turn=row.turn,
            is_cut=is_cut,
            teacher_id=row.teacher_id,
        )
        if pieces is None:
            return example
        refuse_cut_text(row, pieces, self.in_context.behind_end)
        ids = self.in_context.ids(prompt, pieces)[: self.room(example)]
        text = "".join(piece.text for piece in pieces)
        if not self.placeholder_ids.isdisjoint(ids) or any(p in text for p in self.placeholders):
            raise ValueError(
                f"{row.where}: a completion must be text, got a picture's placeholder in "
                f"{text[:80]!r}; remove it from the answer."
            )
        return self._with_generation_prompt(row, example.with_completion(ids, pieces))

    def _with_generation_prompt(self, row: Row, example: Example) -> Example:
        if isinstance(row.prompt, str):
            return example
        prompt = self.renderer.prompt(row)
        if prompt == example.prompt_text:
            return example
        length, is_cut = self._prompt_length(row, prompt, self._adds_special_tokens(row, prompt))
        is_cut |= example.is_cut
        return replace(example, generation_prompt=(prompt, length), is_cut=is_cut)

    def with_frames(self, row: Row, example: Example) -> Example:
        """The example with what the template writes around answers of its row."""
        if isinstance(row.prompt, str):
            return example
        return replace(example, frames=self.renderer.frames(row, self.renderer.prompt(row)))

    def answered(self, example: Example, texts: Mapping[str, str], *, is_ended: bool) -> Example:
        """The example with these texts as its answer, as the template writes them."""
        frame = example.frames.around(texts)
        if frame is not None:
            pieces, prompt = frame.pieces(texts), frame.prompt
        elif CONTENT in texts:  # plain text
            pieces = [Piece(texts[CONTENT], False, CONTENT), Piece("", True)]
            prompt = example.prompt_text
        else:
            raise ValueError("the chat template has no place for thoughts, and there is no more")
        length = example.prompt_length
        if prompt != example.prompt_text and not example.is_cut:
            length += self.in_context.length(prompt) - self.in_context.length(example.prompt_text)
        example = replace(example, prompt_text=prompt, prompt_length=length)
        ids = self.in_context.ids(prompt, pieces, is_ended=is_ended)
        if not self.placeholder_ids.isdisjoint(ids):
            raise ValueError(f"the text holds a picture's placeholder, got {texts}")
        return example.with_completion(ids[: self.room(example)], pieces)

    def room(self, example: Example) -> int | None:
        """Tokens that max_length leaves a completion."""
        return None if self.max_length is None else max(0, self.max_length - example.prompt_length)

    def _adds_special_tokens(self, row: Row, prompt: str) -> bool:
        """Whether special tokens are added, as apply_chat_template(tokenize=True) has it:
        tokenizers take a template's text as it is, processors and plain text get the tokenizer's
        own unless the text begins with them.
        """
        if not self.is_vlm and not isinstance(row.prompt, str):
            return False
        return not has_bos(self.tokenizer, prompt)

    def _prompt_length(
        self, row: Row, prompt: str, adds_special_tokens: bool
    ) -> tuple[int, bool]:  # and whether the prompt is cut to it
        try:
            given = row.images, adds_special_tokens, row.videos
            length = len(prompt_ids(self.processor, prompt, *given))
        except Exception as error:  # a strip makes LFM2-VL's raise torch's RuntimeError
            kind = PictureError if row.images or row.videos else ValueError
            raise kind(
                f"{row.where}: the processor refuses the prompt {prompt[:80]!r} with "
                f"{len(row.images)} pictures of {[image.size for image in row.images]}"
                f"{describe_videos(row.videos)} ({told(error)}); look for a picture's placeholder "
                "written into the text, and for odd shapes."
            ) from error
        if length == 0:
            raise ValueError(
                f"{row.where}: a prompt must have at least one token, got {prompt!r}, "
                "after which nothing predicts the completion; drop the row or give it a prompt."
            )
        if self.max_length is not None and length >= self.max_length:
            if self.cut_to is not None:
                return self.cut_to, True
            raise LongPromptError(
                f"{row.where}: the prompt has {length} tokens with {len(row.images)} pictures, "
                f"max_length={self.max_length} leaves no room for a completion; raise max_length "
                "or make the pictures smaller, or set on_long_prompt."
            )
        return length, False


def until_end(ids: list[int], end_ids: Collection[int]) -> list[int]:
    """Ids up to and with the first end token."""
    end = next((i for i, token_id in enumerate(ids) if token_id in end_ids), None)
    return ids if end is None else ids[: end + 1]


def tokenizer_with_template(processor: Processor) -> PreTrainedTokenizerBase:
    """The tokenizer, with its processor's template where it has none: what ends a turn is found
    with it.
    """
    tokenizer = tokenizer_of(processor)
    if tokenizer.chat_template is None and processor.chat_template is not None:
        tokenizer = copy(tokenizer)
        tokenizer.chat_template = processor.chat_template
    return tokenizer


def build_inputs(processor: Processor, examples: Sequence[Example]) -> ModelInputs:
    """Prompts, pictures and completions of a micro-batch, padded on the right whatever side the
    tokenizer pads for generation: what stands behind a text changes nothing in a causal model, also
    in one that takes no positions, or no mask.

    Tensors of the text are extended over the completion; others (pixel values and their sizes) pass
    through.
    """
    tokenizer = tokenizer_of(processor)
    made = examples[0].made  # by who wrote what stands behind them
    if made is not None and made.are_of(processor, examples):
        prompts = made.tensors
    else:
        prompts = process_examples(processor, examples)
    prompt_lengths = prompts["attention_mask"].sum(1).tolist()
    lengths = [p + len(e.written_ids) for p, e in zip(prompt_lengths, examples, strict=True)]
    tensors: dict[str, Tensor] = {}
    for name, tensor in prompts.items():
        if name == "input_ids":
            pad = tokenizer.pad_token_id
            tensors[name] = text_tensors.extended(tensor, prompt_lengths, lengths, pad, pad)
        elif (places := text_tensors.places_of(processor, name)) is not None:
            tensors[name] = text_tensors.extended(tensor, prompt_lengths, lengths, 0, places.answer)
        else:
            tensors[name] = tensor
    width = max(lengths)
    labels = torch.full((len(examples), width), IGNORE_INDEX)
    scored = []
    for b, example in enumerate(examples):
        completion = slice(prompt_lengths[b], lengths[b])
        labels[b, completion] = torch.tensor(example.written_ids, dtype=torch.int64)
        tensors["input_ids"][b, completion] = labels[b, completion]
        # The causal shift, the only one: position l - 1 predicts the token at l.
        scored.append(torch.arange(completion.start, completion.stop) + (b * width - 1))
    return ModelInputs(tensors, labels, torch.cat(scored))


def build_side(
    processor: Processor,
    examples: list[Example],
    to_device: Callable[[Tensor], Tensor],
    unscored: Sequence[Example] = (),  # without completions; they only run through the model
    *,
    shares_prompts: bool = False,
) -> SideInputs:
    """build_inputs on the device, with the labels of the scored rows only. Where prompts are shared
    a sequence is a prompt with all of its completions.
    """
    rows = [*examples, *unscored]
    trunks = trunks_of(rows) if shares_prompts else []
    inputs = build_inputs(processor, [trunk.example for trunk in trunks] or rows)
    shared, scored_rows = None, inputs.scored_rows
    if shares_prompts:
        lengths = inputs.tensors["attention_mask"].sum(1).tolist()
        shared = [trunk.parts(length) for trunk, length in zip(trunks, lengths, strict=True)]
        scored_rows = scored_places(trunks, shared, inputs.labels.shape[1])
    labels = [token_id for example in examples for token_id in example.written_ids]
    return SideInputs(
        examples,
        {name: to_device(tensor) for name, tensor in inputs.tensors.items()},
        to_device(scored_rows),
        to_device(torch.tensor(labels, dtype=torch.int64)),
        shared=shared,
    )

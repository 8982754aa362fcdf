"""What travels through a training step, from the data loader to the loss.

A row is rendered into an Example of each side. A WindowBatch holds the examples of one micro-batch
while its window waits: pictures raw, completions as token ids. Its turn makes it a MicroBatch:
tensors on the device.

B sequences, L positions (L_s, L_t), N scored rows of a side (N_s, N_t), G aligned groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from gold_kernels import TokenAlignment
from gold_trainer.data.row_errors import BadRow
from gold_trainer.data.rows import name_of
from gold_trainer.data.videos import Video
from gold_trainer.rendering.frames import Frames, Piece

NO_FRAMES = Frames()


@dataclass
class Example:
    """A rendered row; completion_ids is None where the completion has to be generated."""

    index: int  # row of the dataset
    prompt_text: str
    prompt_length: int  # tokens, image tokens included; of a prompt that is cut, its last ones
    images: list[Image.Image]
    completion_ids: list[int] | None
    # Those of the tokenizer, in front of the prompt and behind it; None: unless the text has them.
    adds_special_tokens: bool | None = None
    # With two tokenizers: what the template writes around answers, and what this one is made of.
    frames: Frames = NO_FRAMES
    pieces: list[Piece] | None = None
    # Text and length, where the template writes something else before the known answer.
    generation_prompt: tuple[str, int] | None = None
    videos: list[Video] = field(default_factory=list)
    turn: int | None = None  # of the row, where every turn is an example of its own
    is_cut: bool = False  # of the prompt the last prompt_length tokens are seen
    teacher_id: str | None = None  # whom it learns from, where there are several
    is_blank: bool = False  # no row: in the place of a micro-batch of which none is left
    # Of a completion that was sampled: what the tokens had in its writer's distribution.
    logprobs: list[float] | None = None
    # The prompts' tensors of a micro-batch with this one, where its writer has made them.
    made: "PromptTensors | None" = field(default=None, repr=False, compare=False)

    @property
    def where(self) -> str:
        return name_of(self.index, self.turn)

    @property
    def prompt(self) -> tuple[str, int, bool, bool | None]:
        """What becomes of it, beside its pictures and videos."""
        return self.prompt_text, self.prompt_length, self.is_cut, self.adds_special_tokens

    @property
    def written_ids(self) -> list[int]:
        assert self.completion_ids is not None, "a completion is written before it is scored"
        return self.completion_ids

    def with_completion(
        self, completion_ids: list[int], pieces: list[Piece] | None = None
    ) -> "Example":
        return replace(self, completion_ids=completion_ids, pieces=pieces, logprobs=None)

    def with_sample(self, completion_ids: list[int], logprobs: list[float]) -> "Example":
        return replace(self, completion_ids=completion_ids, pieces=None, logprobs=logprobs)

    def unanswered(self) -> "Example":
        """The example as the model is prompted, whatever its template writes before a known
        answer.
        """
        text, length = self.generation_prompt or (self.prompt_text, self.prompt_length)
        return replace(
            self, prompt_text=text, prompt_length=length, completion_ids=None, pieces=None
        )


@dataclass
class PromptTensors:
    """What a processor makes of prompts, on the host: made before somebody needs them."""

    processor: Any
    examples: list[Example]
    tensors: dict[str, Tensor]  # padded on the left

    def are_of(self, processor: Any, examples: Sequence[Example]) -> bool:
        """Whether they are what it makes of these prompts, whatever stands behind them."""
        prompts = [[e.prompt for e in own] for own in (self.examples, examples)]
        return (
            processor is self.processor
            and prompts[0] == prompts[1]
            and all(
                own.images is other.images and own.videos is other.videos
                for own, other in zip(self.examples, examples, strict=True)
            )
        )


@dataclass
class BatchAlignment:
    """How the completions of a batch meet in the tokens of student and teacher."""

    groups: TokenAlignment  # of all completions of the batch
    skip_reasons: list[str | None]  # of every completion; None for one that is distilled
    parts: list[TokenAlignment] | None = None  # of each, where several teachers divide them

    def to(self, move: Callable[[Tensor], Tensor]) -> "BatchAlignment":
        tensors: dict[str, Any] = {
            name: move(value)
            for name, value in self.groups._asdict().items()
            if isinstance(value, Tensor)
        }
        return BatchAlignment(self.groups._replace(**tensors), self.skip_reasons, self.parts)


@dataclass
class WindowBatch:
    """The examples of one micro-batch, for student and teacher."""

    examples: list[Example]  # as the student sees them
    teacher_examples: list[Example]  # the same list where both sides see the same
    alignment: BatchAlignment | None = None  # with two tokenizers, once completions are known
    source: str = "dataset"  # who wrote the completions: "student", "teacher" or "dataset"
    skipped: list[BadRow] = field(default_factory=list)  # rows that were left out of it
    # Rows that run through the model only, so that all ranks run its same parts; the teacher's are
    # for one that is sharded.
    unscored: list[Example] = field(default_factory=list)
    teacher_unscored: list[Example] = field(default_factory=list)
    # Whether what its rows have in common is computed once: speed/shared_prompts.py.
    shares_prompts: bool = False

    @property
    def is_on_policy(self) -> bool:
        return self.source == "student"

    @property
    def is_blank(self) -> bool:
        return all(example.is_blank for example in self.examples)


class ModelInputs(NamedTuple):
    """One side of a micro-batch as its processor makes it."""

    tensors: dict[str, Tensor]  # what the model's forward takes, input_ids (B, L)
    labels: Tensor  # (B, L), IGNORE_INDEX except on completions
    scored_rows: Tensor  # (N,) flat positions b * L + l whose logits predict a completion token


@dataclass
class SideInputs:
    """One side of a micro-batch on the device, and the examples that it was made of."""

    examples: list[Example]
    tensors: dict[str, Tensor]  # what the model's forward takes, input_ids (B, L)
    scored_rows: Tensor  # (N,) flat positions b * L + l whose logits predict a completion token
    labels: Tensor  # (N,) int64, the tokens that they predict
    # Of several teachers: what each says of its own rows, (N_t, D_t).
    by_teacher: dict[str, Tensor] | None = None
    # Where prompts are shared, what each of the B sequences is made of: lengths of a prompt, and of
    # the completions behind it, each of which sees the prompt and itself.
    shared: list[list[int]] | None = None

    @classmethod
    def without_tensors(cls, examples: list[Example]) -> "SideInputs":
        """For a teacher that needs the examples alone. No picture becomes pixels for it."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(examples, {}, none, none)

    def to(self, move: Callable[[Tensor], Tensor]) -> "SideInputs":
        tensors = {name: move(tensor) for name, tensor in self.tensors.items()}
        return replace(
            self,
            tensors=tensors,
            scored_rows=move(self.scored_rows),
            labels=move(self.labels),
        )


@dataclass
class MicroBatch:
    """What one forward and backward pass works on."""

    student: SideInputs
    teacher: SideInputs  # the student's own where both sides see the same
    is_on_policy: bool
    alignment: BatchAlignment | None = None  # with two tokenizers
    # What token_weighting may need and leave: a second look of the teacher, at pictures without
    # detail, with its hidden states (N_t, D_t); whether a weight is one that cannot be.
    without_detail: SideInputs | None = None
    hidden_without_detail: Tensor | None = None
    bad_weights: Tensor | None = None  # () bool

    def to(self, move: Callable[[Tensor], Tensor]) -> "MicroBatch":
        student = self.student.to(move)
        teacher = student if self.teacher is self.student else self.teacher.to(move)
        alignment = None if self.alignment is None else self.alignment.to(move)
        coarse = None if self.without_detail is None else self.without_detail.to(move)
        return MicroBatch(student, teacher, self.is_on_policy, alignment, coarse)

    @property
    def num_completions(self) -> int:
        return sum(not example.is_blank for example in self.student.examples)

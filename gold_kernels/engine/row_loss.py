"""What a row loss is: numbers, tensors, and a function for the logits of a few rows.

R projected rows, C rows of a chunk, V vocabulary. A row loss looks at the logits of a few rows of
two models, says what each row loses, and writes how the student's logits should move. It knows
nothing of hidden states, heads, chunks or autograd: those are the engine's.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gold_kernels.engine.chunk_plan import Limits
from gold_kernels.engine.chunking import RowFunction
from gold_kernels.engine.linear_head import LinearHead
from gold_kernels.engine.products import Projection
from gold_kernels.engine.slices import Slices

LOSS, CROSS_ENTROPY = "loss", "cross_entropy"  # names of the first two row values of every loss

ROW_LOSSES: dict[str, type["RowLoss"]] = {}  # by name: operators take strings, not objects


class Rows(NamedTuple):
    """What a row loss is started with, once for all chunks of a call."""

    values: Tensor  # (number of value_names, R), zeros: row functions write [:, rows]
    labels: Tensor | None  # (R,) int64, of the cross-entropy
    limits: Limits
    backend: str  # "torch" or "triton"
    has_metrics: bool  # write the values beyond the loss and the cross-entropy too
    student: LinearHead | None = None  # None where the caller holds logits
    teacher: LinearHead | None = None
    slices: Slices | None = None  # of which a row function sees this process'; None: whole rows

    @property
    def has_masks(self) -> bool:
        """Logits may be -inf: only a bias, or the caller, makes such logits."""
        sides = (self.student, self.teacher)
        return any(side is None or side.bias is not None for side in sides)

    @property
    def softcap(self) -> float | None:
        """The student's logits are softcap tanh(x / softcap); gradients are those of x."""
        return None if self.student is None else self.student.softcap


@dataclasses.dataclass(frozen=True)
class RowLoss:
    """Base of all row losses: a frozen dataclass of numbers and tensors.

    A subclass sets name and value_names and defines start. Its fields travel through an operator,
    which takes flat lists: a field is one number, or as many numbers or tensors as its entry in
    number_sizes or tensor_sizes says.
    """

    name: ClassVar[str] = ""
    value_names: ClassVar[tuple[str, ...]] = (LOSS, CROSS_ENTROPY)
    number_sizes: ClassVar[dict[str, int]] = {}
    tensor_sizes: ClassVar[dict[str, int]] = {}
    is_shared: ClassVar[bool] = True  # student and teacher have one vocabulary
    backends: ClassVar[tuple[str, ...]] = ("torch", "triton")
    # its row function takes slices of the vocabulary (Rows.slices); else processes exchange them
    takes_slices: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "start" in cls.__dict__ and "takes_slices" not in cls.__dict__:
            cls.takes_slices = False  # a parent's rows are the parent's
        if not cls.__dict__.get("name"):  # an inherited name is the parent's: see checks
            return
        known = ROW_LOSSES.get(cls.name)
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise ValueError(
                f"{cls.__qualname__}: name must be new, got {cls.name!r}, the name of "
                f"{known.__module__}.{known.__qualname__}; choose another."
            )
        ROW_LOSSES[cls.name] = cls

    def start(self, rows: Rows) -> RowFunction:
        """The function that run_chunks calls on every chunk; see chunking.RowFunction.

        Its weights are (C, T), a column a term: the loss, then, where there are labels, the
        cross-entropy. It writes sum_t weights[:, t] * gradient of term t, and unweighted values.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define start; see docs/add_a_loss.md."
        )

    def slices(
        self,
        student: LinearHead,
        teacher: LinearHead | None,
        labels: Tensor | None,
        logits_dtype: torch.dtype,
    ) -> Slices | None:
        """Rows.slices: both sides' must be of the same entries."""
        is_same = teacher is not None and student.slices == teacher.slices
        return student.slices if self.takes_slices and is_same else None

    def check(self, function: str) -> None:
        """Raise ValueError for numbers out of range, in the name of the public function."""

    def grad_bound(self) -> float:
        """At least 1; what an entry of a row's gradient is held to beside its weight (float16)."""
        return 1.0

    def projection(self) -> Projection | None:
        """How gradients of logits become those of hidden states; None: by the head alone."""
        return None

    def limits(self, limits: Limits, v_student: int, v_teacher: int, rows: Rows) -> Limits:
        """The limits less what the row function needs beside logits."""
        return limits

    def by_field(self) -> dict[str, Sequence[float]]:
        """The numbers of each field; what is no number of Python is left as it is."""
        numbers = {}
        for field in dataclasses.fields(self):
            if field.name not in self.tensor_sizes:
                value, size = getattr(self, field.name), self.number_sizes.get(field.name)
                is_given = size is not None and isinstance(value, tuple | list)
                numbers[field.name] = value if is_given else [value] * (size or 1)
        return numbers

    def numbers(self) -> list[float]:
        return [number for numbers in self.by_field().values() for number in numbers]

    def tensors(self) -> list[Tensor | None]:
        """Contiguous: kernels read ids and numbers of rows one behind the other."""
        flat: list[Tensor | None] = []
        for name, size in self.tensor_sizes.items():
            value = getattr(self, name)
            flat.extend([None] * size if value is None else [part.contiguous() for part in value])
        return flat

    @classmethod
    def from_flat(cls, numbers: Sequence[float], tensors: Sequence[Tensor | None]) -> "RowLoss":
        """The loss whose numbers() and tensors() these are."""
        fields: dict[str, object] = {}
        first = 0
        for name in (field.name for field in dataclasses.fields(cls)):
            if name in cls.tensor_sizes:
                continue
            size = cls.number_sizes.get(name)
            fields[name] = numbers[first] if size is None else tuple(numbers[first : first + size])
            first += size or 1
        first = 0
        for name, size in cls.tensor_sizes.items():
            part = list(tensors[first : first + size])
            fields[name] = None if part[0] is None else part
            first += size
        return cls(**fields)

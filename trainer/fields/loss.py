"""Fields of GOLDConfig for the loss: which one, its numbers, and what it may take of the device."""

import dataclasses
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from gold_kernels.engine.checks import BACKENDS
from gold_kernels.losses import LOSSES
from gold_trainer.fields.checks import as_dict, refuse_given
from gold_trainer.nearest import did_you_mean

LOGITS_DTYPES = ("float32", "bfloat16")
# Numbers of losses that have fields of their own, with the names that TRL users know.
NUMBER_FIELDS = {
    "beta": ("beta",),
    "temperature": ("loss_temperature", "loss_teacher_temperature"),
}
# Fields of losses over one vocabulary -> those of the loss across tokenizers.
ACROSS = {
    "crossentropy_weight": "uld_crossentropy_weight",
    "distillation_weight": "uld_distillation_weight",
    "loss_temperature": "uld_student_temperature and uld_teacher_temperature",
    "loss_teacher_temperature": "uld_student_temperature and uld_teacher_temperature",
    "loss": "uld_use_hybrid_loss, or leave it out",
    "loss_kwargs": "the uld_ fields",
    "loss_top_k": "0: the k tokens belong to one vocabulary",
}


@dataclass
class LossFields:
    """The loss of a student and a teacher with one tokenizer:

        loss = distillation_weight * mean over tokens of the loss by name
             + crossentropy_weight * mean over tokens of off-policy completions of their CE

    CE is the cross-entropy of a token at temperature 1. Both means are over the global batch. The
    last four fields hold for the loss across tokenizers too; see ULDFields for its other fields.
    """

    loss: str = field(
        default="jsd",
        metadata={
            "help": "Loss over one vocabulary: jsd, skew_kl, skew_reverse_kl, total_variation, or "
            "one of yours."
        },
    )
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Numbers of that loss which have no field of their own, as {"alpha": 0.2}.'
        },
    )
    beta: float = field(
        default=0.5,
        metadata={
            "help": "Of jsd, and with use_uld_loss of all but plain ULD: 0 is forward KL, 1 is "
            "reverse KL, between them JSD."
        },
    )
    loss_top_k: int = field(
        default=0,
        metadata={
            "help": "Of jsd: the teacher's k likeliest tokens, and one outcome for all others; a "
            "cache keeps these alone, and a server sends them. 0: all tokens."
        },
    )
    loss_temperature: float = field(
        default=1.0, metadata={"help": "Divides the logits of both sides in the loss."}
    )
    loss_teacher_temperature: float | None = field(
        default=None,
        metadata={"help": "Divides the teacher's logits instead; None: as loss_temperature."},
    )
    distillation_weight: float = field(default=1.0, metadata={"help": "Weight of the loss."})
    crossentropy_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the cross-entropy on completions that the student did not write."
        },
    )
    chunk_size: int | None = field(
        default=None,
        metadata={"help": "Most rows of logits at a time; None: what the memory budget holds."},
    )
    loss_budget_mib: float | None = field(
        default=None,
        metadata={"help": "Extra memory of the loss in MiB; None: the library's 1024."},
    )
    logits_dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the logits. bfloat16 is faster, and wrong where the student is close "
            "to the teacher.",
            "choices": LOGITS_DTYPES,
        },
    )
    loss_backend: str | None = field(
        default=None,
        metadata={
            "help": "triton or torch; None: the one that fits the device.",
            "choices": BACKENDS,
        },
    )

    @property
    def teacher_temperature(self) -> float:
        given = self.loss_teacher_temperature
        return self.loss_temperature if given is None else given

    @property
    def loss_numbers(self) -> dict[str, Any]:
        """The numbers of the loss, by its own names."""
        names = numbers_of(self.loss)
        numbers = dict(as_dict(self.loss_kwargs))
        if "beta" in names:
            numbers["beta"] = self.beta
        if "temperature" in names:
            numbers["temperature"] = self.loss_temperature
            if self.loss_teacher_temperature is not None:
                pair = self.loss_temperature, self.loss_teacher_temperature
                numbers["temperature"] = pair
        return numbers

    def check_loss(self, *, is_across: bool) -> None:
        """ValueError for what cannot be together, and for fields that the loss would ignore."""
        if self.distillation_weight == self.crossentropy_weight == 0:
            raise ValueError(
                "GOLDConfig: distillation_weight or crossentropy_weight must be above 0, got 0 for "
                "both; nothing would be learnt."
            )
        if is_across:
            self._check_none_is_given()
        else:
            self._check_name()
            self._check_kwargs()
            self._check_top_k()

    def _check_none_is_given(self) -> None:
        for name, remedy in ACROSS.items():
            default = LossFields.__dataclass_fields__[name].default
            refuse_given(self, (name,), f"{default!r} with use_uld_loss", f"; set {remedy}")

    def _check_name(self) -> None:
        if self.loss not in LOSSES:
            remedy = "; set use_uld_loss=True for the loss across tokenizers."
            raise ValueError(
                f"GOLDConfig: loss must be one of {', '.join(LOSSES)}, got {self.loss!r}"
                f"{did_you_mean(self.loss.lower(), LOSSES) or remedy}"
            )
        names = numbers_of(self.loss)
        for number in (number for number in NUMBER_FIELDS if number not in names):
            must_be = f"left out with loss={self.loss!r}, which has no {number}"
            remedy = f"; its numbers are {_list(names)}"
            refuse_given(self, NUMBER_FIELDS[number], must_be, remedy)

    def _check_top_k(self) -> None:
        if self.loss_top_k and self.loss != "jsd":
            raise ValueError(
                f"GOLDConfig: loss must be 'jsd' with loss_top_k={self.loss_top_k}, got "
                f"{self.loss!r}; leave one of the two out: the k tokens have the generalized JSD."
            )

    def _check_kwargs(self) -> None:
        names = [name for name in numbers_of(self.loss) if name not in NUMBER_FIELDS]
        for name, value in as_dict(self.loss_kwargs).items():
            if name in NUMBER_FIELDS:
                raise ValueError(
                    "GOLDConfig: loss_kwargs must hold numbers without a field of their own, got "
                    f"{name}={value!r}; set {NUMBER_FIELDS[name][0]}."
                )
            if name not in names:
                raise ValueError(
                    f"GOLDConfig: loss_kwargs must hold numbers of loss={self.loss!r}, got "
                    f"{name}={value!r}; they are {_list(names)}."
                )
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(
                    f"GOLDConfig: loss_kwargs must hold numbers, got {self.loss_kwargs} "
                    f"({name} is {type(value).__name__}); write them without quotes."
                )
        LOSSES[self.loss](**self.loss_numbers).check("GOLDConfig")


def numbers_of(loss: str) -> list[str]:
    return [f.name for f in dataclasses.fields(LOSSES[loss])]


def _list(names: list[str]) -> str:
    return ", ".join(names) or "none"

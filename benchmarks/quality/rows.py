"""The rows of the table, as data: which losses, on which pair, with which policy.

A new loss is one line of LOSSES. A field that GOLDConfig does not have makes a row that says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quality import pictures
from quality.scales import RECORD, SMALL, Scale

KEYS = ("pair", "loss", "policy", "crossentropy", "seed", "rate")
NUMBERS = ("accuracy", *pictures.KINDS, "teacher_accuracy")
LAST = ()
IS_SIDE_BY_SIDE = False  # students are schooled when the teacher has been
TURNS = ("same", "cross", "cross")  # which pairs the workers begin with: runs of same are shorter
OUTPUT = "quality.csv"
SCALES = {"record": RECORD, "small": SMALL}
PAIRS = ("same", "cross")  # tokenizers of student and teacher
POLICIES = {"off": 0.0, "on": 0.5}  # lmbda: the student writes no or half of the completions
ACROSS = {"use_uld_loss": True}
HYBRID = {**ACROSS, "uld_use_hybrid_loss": True}
LIKELIHOOD = {**ACROSS, "uld_loss_type": "chunk_likelihood"}


@dataclass(frozen=True)
class Loss:
    """Fields of GOLDConfig, and the pairs that it can compare."""

    name: str
    pairs: tuple[str, ...]
    fields: dict[str, Any] = field(default_factory=dict, hash=False)
    crossentropy_weight: float = 1.0  # where it is added


LOSSES = (
    Loss("jsd_0", ("same",), {"beta": 0.0}),
    Loss("jsd_0.5", ("same",), {"beta": 0.5}),
    Loss("jsd_1", ("same",), {"beta": 1.0}),
    Loss("skew_kl", ("same",), {"loss": "skew_kl", "loss_kwargs": {"alpha": 0.1}}),
    Loss("uld", PAIRS, ACROSS),
    Loss("hybrid_0", ("cross",), {**HYBRID, "beta": 0.0}),
    Loss("hybrid_0.5", ("cross",), {**HYBRID, "beta": 0.5}),
    Loss("h_kl", ("cross",), {**HYBRID, "uld_relaxed_overlap": True, "beta": 0.0}),
    Loss("p_kl", ("cross",), {**ACROSS, "uld_loss_type": "projected_jsd", "beta": 0.0}),
    # 1 / uld_group_temperature as large as the others
    Loss("chunk_likelihood", ("cross",), {**LIKELIHOOD, "beta": 0.0}, crossentropy_weight=0.01),
)

# What is not distilled: cross-entropy alone, on answers of three kinds.
LABELS = ("labels", "all_labels", "seq_kd")
GIVEN = ("teacher", "before")  # nothing is trained: models as they are given
TEACHER_FAMILY = "idefics3"
STUDENT_FAMILY = {"same": "idefics3", "cross": "llava"}
STUDENTS = STUDENT_FAMILY  # pair -> name of its weights


@dataclass(frozen=True)
class Case:
    """A run, or the accuracy of a model that is given."""

    pair: str
    loss: str
    policy: str  # off or on
    crossentropy: str  # yes or no
    seed: int
    rate: float = 1.0  # times the learning rate; another in the table of rates alone

    @property
    def key(self) -> tuple[str, ...]:
        """The key of its row in the CSV."""
        return tuple(str(getattr(self, name)) for name in KEYS)

    @property
    def rank(self) -> int:
        """0 is run first: what is given, cross-entropy alone, each loss alone off-policy."""
        if self.loss in (*GIVEN, *LABELS):
            return 0
        kinds = [("off", "no"), ("off", "yes"), ("on", "no"), ("on", "yes")]
        return kinds.index((self.policy, self.crossentropy))


def loss_of(name: str) -> Loss:
    return next(loss for loss in LOSSES if loss.name == name)


def cases_of(seeds: Sequence[int], names: Sequence[str] = ()) -> list[Case]:
    """All seeds of what is more important before anything else; of the losses these, or all."""
    losses = [loss for loss in LOSSES if not names or loss.name in names]
    given = [Case("same", "teacher", "off", "yes", 0)]
    given += [Case(pair, "before", "off", "yes", 0) for pair in PAIRS]
    labels = [Case(pair, n, "off", "yes", seed) for seed in seeds for n in LABELS for pair in PAIRS]
    distilled = [
        Case(pair, loss.name, policy, crossentropy, seed)
        for seed in seeds
        for loss in losses
        for pair in loss.pairs
        for policy in POLICIES
        for crossentropy in ("no", "yes")
    ]
    return sorted([*given, *labels, *distilled], key=lambda case: (case.rank, case.seed))


def small_cases() -> list[Case]:
    """One of each kind."""
    return [
        Case("same", "teacher", "off", "yes", 0),
        Case("same", "before", "off", "yes", 0),
        Case("same", "labels", "off", "yes", 0),
        Case("same", "jsd_0.5", "on", "no", 0),
        Case("cross", "seq_kd", "off", "yes", 0),
        Case("cross", "uld", "off", "no", 0),
        Case("cross", "hybrid_0", "on", "yes", 0),
    ]


def config_fields(case: Case) -> dict[str, Any]:
    """Fields of GOLDConfig: loss, policy and cross-entropy."""
    if case.loss in LABELS:
        fields = dict(ACROSS) if case.pair == "cross" else {}
        weights = {"distillation_weight": 0.0, "crossentropy_weight": 1.0}
    else:
        fields = dict(loss_of(case.loss).fields)
        weight = loss_of(case.loss).crossentropy_weight
        weights = {"crossentropy_weight": weight} if case.crossentropy == "yes" else {}
    prefix = "uld_" if fields.get("use_uld_loss") else ""
    weights = {prefix + name: value for name, value in weights.items()}
    return {**fields, **weights, "lmbda": POLICIES[case.policy]}


def draw(folder: Path, scale: Scale, workers: int) -> None:
    """Pictures of each part, unless they are there."""
    for name, number, held_out in (
        ("teacher", scale.teacher_pictures, False),
        ("prompts", scale.prompts, False),
        ("held_out", scale.held_out, True),
    ):
        path = folder / f"{name}.npz"
        if not path.exists():
            drawn = pictures.ask_many(number, seed=name, held_out=held_out, workers=workers)
            pictures.save(drawn, path)


def report(rows: Sequence[dict[str, str]], picture: Path) -> str:
    from quality import table

    return table.report(rows, picture)

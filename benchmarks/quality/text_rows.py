"""The rows of the table of text, as data.

small    a student of a quarter of the teacher's size, schooled on a part of its text
int4     the teacher itself with linear layers fake-quantised to 4 bits (QAD)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quality import texts
from quality.scales import TEXT_RECORD, TEXT_SMALL, TextScale

KEYS = ("student", "loss", "precision", "crossentropy", "seed", "rate")
NUMBERS = ("perplexity", "bits_per_byte", "agreement", "kl", "teacher_perplexity")
LAST = ("text",)
IS_SIDE_BY_SIDE = False  # a student may be made of the teacher's layers
TURNS = ("small", "int4", "small")  # which students the workers begin with
STUDENTS = {"small": "small"}  # student -> name of its weights
OUTPUT = "quality_text.csv"
SCALES = {"record": TEXT_RECORD, "small": TEXT_SMALL}
GIVEN = ("teacher", "before")

# name -> of make_loss
LOSSES: dict[str, tuple[str, dict[str, float]]] = {
    "jsd_0": ("jsd", {"beta": 0.0}),
    "jsd_0.5": ("jsd", {"beta": 0.5}),
    "jsd_1": ("jsd", {"beta": 1.0}),
    "skew_kl": ("skew_kl", {"alpha": 0.1}),
    "skew_reverse_kl": ("skew_reverse_kl", {"alpha": 0.1}),
    "total_variation": ("total_variation", {}),
    "uld": ("uld", {}),  # fused_linear_uld
}
# times the learning rate, of one seed: whether ULD alone undoes what a student knew at each
RATES = {"uld": (0.03, 0.1, 0.3, 3.0), "jsd_0": (0.3, 3.0), "labels": (0.3, 3.0)}
PRECISIONS = ("precise", "fast", "eager_bf16")


@dataclass(frozen=True)
class Case:
    student: str
    loss: str
    precision: str = "precise"
    crossentropy: str = "no"  # beside the loss, on what follows in the text
    seed: int = 0
    rate: float = 1.0  # times the learning rate

    @property
    def pair(self) -> str:
        """What a worker stays with."""
        return self.student

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(getattr(self, name)) for name in KEYS)

    @property
    def rank(self) -> int:
        """0 is run first: each loss alone; other rates; losses beside cross-entropy."""
        if self.rate != 1:
            return 1
        return 2 if self.crossentropy == "yes" and self.loss in LOSSES else 0


def cases_of(seeds: Sequence[int], names: Sequence[str] = ()) -> list[Case]:
    losses = [name for name in LOSSES if not names or name in names]
    cases = [Case("small", "teacher"), Case("small", "before"), Case("int4", "before")]
    for seed in seeds:
        cases += [Case(student, "labels", "", "yes", seed) for student in ("int4", "small")]
        cases += [Case("int4", "jsd_0", precision, "no", seed) for precision in PRECISIONS]
        cases += [Case("small", name, "precise", "no", seed) for name in losses]
    for name, rates in RATES.items():
        if name in (*losses, "labels"):
            kind = ("", "yes") if name == "labels" else ("precise", "no")
            cases += [Case("small", name, *kind, rate=rate) for rate in rates]
    cases += [Case("small", name, "precise", "yes", seed) for seed in seeds for name in losses]
    return cases


def small_cases() -> list[Case]:
    return [
        Case("small", "teacher"),
        Case("small", "before"),
        Case("int4", "before"),
        Case("small", "labels", "", "yes"),
        Case("small", "jsd_0.5", "precise", "yes"),
        Case("small", "uld", rate=0.1),
        *(Case("int4", "jsd_0", precision) for precision in PRECISIONS),
    ]


def draw(folder: Path, scale: TextScale, workers: int) -> None:
    """Tokens of each part and what they are of, unless they are there."""
    path = folder / "tokens.npz"
    if not path.exists():
        parts = texts.collect(scale.packages, scale.most_files, workers)
        if scale.weights:
            from quality import weights

            whole = weights.unpack(Path(scale.weights), folder)
            tokenizer, end = whole.backend_tokenizer, whole.eos_token_id
            del parts["teacher"]  # which has learnt already
        else:
            tokenizer, end = texts.build_tokenizer(parts["teacher"], scale.vocabulary), 0
        np.savez(path, **texts.tokenise(parts, tokenizer, end, scale.length))
        sources = texts.sources(scale.packages)
        (folder / "sources.txt").write_text(sources, encoding="utf-8")


def report(rows: Sequence[dict[str, str]], picture: Path) -> str:
    from quality import text_table

    return text_table.report(rows, picture)

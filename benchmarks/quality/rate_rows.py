"""The rows of the table of learning rates, as data: losses alone, off-policy, on the pictures.

Whether ULD alone undoes what a student knew at every rate or at some, and at which rate the others
are at their best. A table of its own: its teacher learns for a shorter time than that of rows.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quality.rows import KEYS, LAST, NUMBERS, PAIRS, STUDENTS, Case, draw
from quality.scales import RATES_RECORD, SMALL

__all__ = ["KEYS", "LAST", "NUMBERS", "STUDENTS", "draw"]  # as a task has them

IS_SIDE_BY_SIDE = True  # a teacher of so many steps learns the same beside the students
TURNS = PAIRS
OUTPUT = "quality_rates.csv"
SCALES = {"record": RATES_RECORD, "small": SMALL}

FACTORS = (0.3, 1.0, 3.0)  # times the learning rate of rows.py
ULD_FACTORS = (0.03, 0.1, *FACTORS)
COMPARED = {"same": ("jsd_0", "seq_kd"), "cross": ("p_kl", "seq_kd")}


@dataclass(frozen=True)
class RateCase(Case):
    @property
    def rank(self) -> int:
        """One seed of everything; the other seeds of ULD; those of what it is compared with."""
        return 0 if self.seed == 0 else 1 if self.loss == "uld" else 2


def cases_of(seeds: Sequence[int], names: Sequence[str] = ()) -> list[RateCase]:
    cases = [RateCase("same", "teacher", "off", "yes", 0)]
    cases += [RateCase(pair, "before", "off", "yes", 0) for pair in PAIRS]
    for seed in seeds:
        for pair in PAIRS:
            for loss in ("uld", *COMPARED[pair]):
                crossentropy = "yes" if loss == "seq_kd" else "no"
                factors = ULD_FACTORS if loss == "uld" else FACTORS
                if not names or loss in names:
                    cases += [RateCase(pair, loss, "off", crossentropy, seed, f) for f in factors]
    return sorted(cases, key=lambda case: (case.rank, case.seed))


def small_cases() -> list[RateCase]:
    """One of each kind."""
    return [
        RateCase("same", "teacher", "off", "yes", 0),
        RateCase("cross", "before", "off", "yes", 0),
        RateCase("cross", "uld", "off", "no", 0, 0.1),
        RateCase("same", "seq_kd", "off", "yes", 0, 3.0),
    ]


def report(rows: Sequence[dict[str, str]], picture: Path) -> str:
    from quality import rate_table

    return rate_table.report(rows, picture)

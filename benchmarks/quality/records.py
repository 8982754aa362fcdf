"""What tables of a record share: rows that differ in their seed alone, and a plot of two panels."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, str]


def groups_of(
    rows: Sequence[Row], names: Sequence[str], rate: float
) -> dict[tuple[str, ...], list[Row]]:
    """Rows of one learning rate by their values of names, in the order of their first rows; rows
    that failed are left out here, and stay in the CSV.
    """
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["status"] == "ok" and float(row["rate"]) == rate:
            groups[tuple(row[name] for name in names)].append(row)
    return groups


def new_panels(**options: Any) -> tuple[Any, Any]:
    """A figure and its two axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, 2, layout="constrained", **options)


def save(figure: Any, path: Path, title: str, first: Row) -> None:
    """Save with a title that says what the first row was measured on."""
    from matplotlib import pyplot as plt

    where = f"{first['device']}, torch {first['torch']}, {first['git_sha']}"
    figure.suptitle(f"{title} {where}", fontsize=9)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)

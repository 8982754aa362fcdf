"""From the CSV of text to tables of means and spreads, and to a plot."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from quality.records import groups_of, new_panels, save

MEASURES = ("perplexity", "bits_per_byte", "agreement", "kl")
COLOURS = {"no": "#0072B2", "yes": "#D55E00"}  # Okabe and Ito's


class Line(NamedTuple):
    """Rows that differ in their seed alone."""

    student: str
    loss: str
    precision: str
    crossentropy: str
    values: dict[str, list[float]]  # measure -> of each seed

    def mean(self, name: str) -> float:
        return mean(self.values[name])

    def spread(self, name: str) -> float:
        return max(self.values[name]) - min(self.values[name])


def lines_of(rows: Sequence[dict[str, str]], rate: float = 1.0) -> list[Line]:
    """Lines of one learning rate, in the order of their first rows."""
    groups = groups_of(rows, ("student", "loss", "precision", "crossentropy"), rate)
    return [
        Line(*key, {name: [float(row[name]) for row in group] for name in MEASURES})
        for key, group in groups.items()
    ]


def name_of(line: Line) -> str:
    """The name as a table has it."""
    if line.student == "small":
        return f"`{line.loss}`" + (", labels" if is_added(line) else "")
    names = {"precise": "float32 logits", "fast": "fast mode", "eager_bf16": "eager bf16"}
    is_plain = line.loss in ("labels", "before")
    return f"`{line.loss}`" if is_plain else f"`{line.loss}`, {names[line.precision]}"


def is_added(line: Line) -> bool:
    return line.crossentropy == "yes" and line.loss != "labels"


def markdown(rows: Sequence[dict[str, str]], student: str) -> str:
    """Nearest to the teacher first; int4 stands beside the teacher too."""
    text = [
        "| loss | perplexity | spread | agreement, % | KL to the teacher, nats | spread | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    own = [x for x in lines_of(rows) if x.student == student or x.loss == "teacher"]
    for line in sorted(own, key=lambda x: x.mean("kl")):
        cells = [name_of(line) if line.loss != "teacher" else "`teacher`"]
        cells += [f"{line.mean('perplexity'):.2f}", f"{line.spread('perplexity'):.2f}"]
        cells.append(f"{100 * line.mean('agreement'):.1f}")
        cells += [f"{line.mean('kl'):.4f}", f"{line.spread('kl'):.4f}"]
        if (seeds := len(line.values["kl"])) == 1:
            cells[2] = cells[5] = ""
        text.append("| " + " | ".join([*cells, str(seeds)]) + " |")
    return "\n".join(text)


def rates(rows: Sequence[dict[str, str]]) -> str:
    """The small student by learning rate, of one seed; nothing where all rows have one rate."""
    factors = sorted({float(row["rate"]) for row in rows})
    if len(factors) == 1:
        return ""
    first = [row for row in rows if row["student"] == "small" and row["seed"] == "0"]
    found: dict[str, dict[float, Line]] = {}
    for factor in sorted(factors, key=lambda f: f != 1):  # which has the losses in their order
        for line in lines_of(first, factor):
            if not is_added(line) and line.loss != "teacher":
                found.setdefault(line.loss, {})[factor] = line
    text = ["| loss | measure | " + " | ".join(f"{f:g} x" for f in factors) + " |"]
    text.append("|---|---|" + "---|" * len(factors))
    for name, unit in (("perplexity", "perplexity"), ("kl", "KL, nats")):
        for loss, lines in found.items():
            if loss == "before" or len(lines) > 1:
                cells = [f"{lines[f].mean(name):.2f}" if f in lines else "" for f in factors]
                text.append(f"| `{loss}` | {unit} | " + " | ".join(cells) + " |")
    return "\n".join(text)


def report(rows: Sequence[dict[str, str]], picture: Path) -> str:
    """All tables; the plot."""
    draw(rows, picture)
    parts = [f"{name}\n\n{markdown(rows, name)}" for name in ("small", "int4")]
    return "\n\n".join([*parts, rates(rows)]).strip()


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """A point a seed: perplexity of the small student, KL of the one in 4 bits."""
    lines = [line for line in lines_of(rows) if line.loss != "teacher"]
    figure, panels = new_panels(figsize=(10, 4))
    for axes, student, name in zip(panels, ("small", "int4"), ("perplexity", "kl"), strict=True):
        own = [line for line in lines if line.student == student]
        own.sort(key=lambda line: -line.mean(name))
        for place, line in enumerate(own):
            values = line.values[name]
            colour = COLOURS["yes" if is_added(line) else "no"]
            axes.scatter(values, [place] * len(values), s=30, color=colour)
        axes.set_yticks(range(len(own)), [name_of(line).replace("`", "") for line in own])
        axes.set(title=f"{student}: {'perplexity' if student == 'small' else 'KL, nats'}")
        axes.grid(alpha=0.3)
    save(figure, path, "Held-out text; a point is a seed.", rows[0])

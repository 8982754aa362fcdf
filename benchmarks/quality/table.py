"""From the CSV to a table of means and spreads, and to a plot."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from quality.records import groups_of, new_panels, save
from quality.rows import GIVEN, LABELS

NAMES = {"same": "one tokenizer", "cross": "two tokenizers"}
POLICIES = {"off": "off-policy", "on": "half on-policy"}
COLOURS = {"off": "#0072B2", "on": "#D55E00"}  # Okabe and Ito's


class Line(NamedTuple):
    """Rows that differ in their seed alone; accuracies in percent."""

    pair: str
    loss: str
    policy: str
    crossentropy: str
    accuracies: list[float]
    seconds: float | None  # mean of a run
    tokens: float | None

    @property
    def mean(self) -> float:
        return mean(self.accuracies)

    @property
    def spread(self) -> float:
        """The distance from the worst seed to the best."""
        return max(self.accuracies) - min(self.accuracies)


def lines_of(rows: Sequence[dict[str, str]], rate: float = 1.0) -> list[Line]:
    """Lines of one learning rate, in the order of their first rows."""
    groups = groups_of(rows, ("pair", "loss", "policy", "crossentropy"), rate)
    return [
        Line(
            *key,
            [100 * float(row["accuracy"]) for row in group],
            mean_of(group, "seconds"),
            mean_of(group, "tokens"),
        )
        for key, group in groups.items()
    ]


def mean_of(rows: Sequence[dict[str, str]], name: str) -> float | None:
    values = [float(row[name]) for row in rows if row[name]]
    return mean(values) if values else None


def markdown(lines: Sequence[Line], pair: str) -> str:
    """The table of one pair, best first."""
    text = [
        "| loss | policy | cross-entropy | right answers, % | spread | seeds | s | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in sorted((x for x in lines if x.pair == pair), key=lambda x: -x.mean):
        cells = [line.loss, line.policy, line.crossentropy, f"{line.mean:.1f}"]
        cells += [f"{line.spread:.1f}" if len(line.accuracies) > 1 else ""]
        cells += [str(len(line.accuracies))]
        cells += ["" if n is None else f"{n:.0f}" for n in (line.seconds, line.tokens)]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def report(rows: Sequence[dict[str, str]], picture: Path) -> str:
    """Tables of all rows, those of docs/choosing.md; the plot."""
    lines = lines_of(rows)
    draw(lines, rows[0], picture)
    parts = [f"{name}\n\n{markdown(lines, pair)}" for pair, name in NAMES.items()]
    parts += [f"{name}, in short\n\n{compact(rows, pair)}" for pair, name in NAMES.items()]
    return "\n\n".join(parts)


def compact(rows: Sequence[dict[str, str]], pair: str) -> str:
    """A line a loss, best first: means of right answers, and the widest spread among them."""
    text = [
        "| loss | off-policy | with cross-entropy | half on-policy | with cross-entropy | spread |",
        "|---|---|---|---|---|---|",
    ]
    lines = [line for line in lines_of(rows) if line.pair == pair or line.loss == "teacher"]
    losses = {line.loss: max(x.mean for x in lines if x.loss == line.loss) for line in lines}
    for loss in sorted(losses, key=lambda name: -losses[name]):
        own = {(x.policy, x.crossentropy): x for x in lines if x.loss == loss}
        if loss in (*LABELS, *GIVEN):
            own = {("off", "no"): next(iter(own.values()))}  # which is all there is
        cells = [
            f"{own[kind].mean:.1f}" if kind in own else ""
            for kind in (("off", "no"), ("off", "yes"), ("on", "no"), ("on", "yes"))
        ]
        spreads = [x.spread for x in own.values() if len(x.accuracies) > 1]
        cells.append(f"{max(spreads):.1f}" if spreads else "")
        text.append(f"| `{loss}` | " + " | ".join(cells) + " |")
    return "\n".join(text)


def draw(lines: Sequence[Line], first: dict[str, str], path: Path) -> None:
    """A point a seed; hollow where cross-entropy is added."""
    figure, panels = new_panels(figsize=(10, 5), sharex=True)
    teacher = next((x.mean for x in lines if x.loss == "teacher"), None)
    for axes, pair in zip(panels, NAMES, strict=True):
        own = [x for x in lines if x.pair == pair and x.loss != "teacher"]
        best = {
            loss: max(x.mean for x in own if x.loss == loss)
            for loss in dict.fromkeys(x.loss for x in own)
        }
        places = {loss: place for place, loss in enumerate(sorted(best, key=lambda k: best[k]))}
        for x in own:
            is_plain = x.loss in (*LABELS, "before")
            colour = "#000000" if is_plain else COLOURS[x.policy]
            face = "none" if x.crossentropy == "yes" and not is_plain else colour
            shift = 0 if is_plain else {"off": 0.12, "on": -0.12}[x.policy]
            heights = [places[x.loss] + shift] * len(x.accuracies)
            axes.scatter(x.accuracies, heights, s=30, facecolors=face, edgecolors=colour)
        if teacher is not None:
            axes.axvline(teacher, color="#888888", linestyle="--")
        axes.set_yticks(list(places.values()), list(places))
        axes.set(title=NAMES[pair], xlabel="right answers, % (dashed: the teacher)")
        axes.grid(alpha=0.3)
    for policy, colour in COLOURS.items():
        for face, what in ((colour, "loss alone"), ("none", "with cross-entropy")):
            label = f"{POLICIES[policy]}, {what}"
            panels[0].scatter([], [], facecolors=face, edgecolors=colour, label=label)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    save(figure, path, "A point is a seed.", first)

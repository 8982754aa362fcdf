"""From the CSV of learning rates to a table of means and to a plot."""

from collections.abc import Sequence
from pathlib import Path

from quality.records import new_panels, save
from quality.table import NAMES, Line, lines_of

COLOURS = {"uld": "#D55E00", "seq_kd": "#000000", "jsd_0": "#0072B2", "p_kl": "#0072B2"}
GIVEN = {"teacher": "--", "before": ":"}  # how their lines are drawn


def factors_of(rows: Sequence[dict[str, str]]) -> list[float]:
    return sorted({float(row["rate"]) for row in rows})


def curves_of(rows: Sequence[dict[str, str]], pair: str) -> dict[str, dict[float, Line]]:
    """loss -> factor -> its line; what is given is there at a factor of 1."""
    found: dict[str, dict[float, Line]] = {}
    for factor in factors_of(rows):
        for line in lines_of(rows, factor):
            if line.pair == pair or line.loss == "teacher":
                found.setdefault(line.loss, {})[factor] = line
    return found


def markdown(rows: Sequence[dict[str, str]], pair: str) -> str:
    """A line a loss: means of right answers by rate, the widest spread, the fewest seeds."""
    factors, curves = factors_of(rows), curves_of(rows, pair)
    text = [
        "| loss | " + " | ".join(f"{factor:g} x" for factor in factors) + " | spread | seeds |",
        "|---|" + "---|" * (len(factors) + 2),
    ]
    for loss in sorted(curves, key=lambda name: -max(x.mean for x in curves[name].values())):
        lines = curves[loss]
        cells = [f"{lines[f].mean:.1f}" if f in lines else "" for f in factors]
        seeds = [len(line.accuracies) for line in lines.values()]
        spread = max(line.spread for line in lines.values())
        cells.append(f"{spread:.1f}" if max(seeds) > 1 else "")
        cells.append(str(min(seeds)))
        text.append(f"| `{loss}` | " + " | ".join(cells) + " |")
    return "\n".join(text)


def report(rows: Sequence[dict[str, str]], picture: Path) -> str:
    draw(rows, picture)
    return "\n\n".join(f"{name}\n\n{markdown(rows, pair)}" for pair, name in NAMES.items())


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """A point a seed, a line through the means."""
    figure, panels = new_panels(figsize=(10, 4), sharey=True)
    for axes, (pair, name) in zip(panels, NAMES.items(), strict=True):
        for loss, lines in curves_of(rows, pair).items():
            if loss in GIVEN:
                height = next(iter(lines.values())).mean
                axes.axhline(height, color="#888888", linestyle=GIVEN[loss], label=loss)
                continue
            means = [line.mean for line in lines.values()]
            axes.plot(list(lines), means, color=COLOURS[loss], label=loss)
            for factor, line in lines.items():
                places = [factor] * len(line.accuracies)
                axes.scatter(places, line.accuracies, s=20, color=COLOURS[loss])
        axes.set_xscale("log")
        axes.set_xticks(factors_of(rows), [f"{factor:g}" for factor in factors_of(rows)])
        axes.minorticks_off()
        axes.set(title=name, xlabel="times the learning rate", ylabel="right answers, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path, "A point is a seed.", rows[0])

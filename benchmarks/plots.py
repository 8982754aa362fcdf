"""Draw what bench_jsd.py recorded, from its CSV alone.

    python benchmarks/plots.py                       # results/jsd.csv -> docs/images/jsd_*.png
    python benchmarks/plots.py some.csv --folder /tmp

Time and memory against N, the cost of a smaller budget, error against beta. The first row of the
CSV says which head and shape the rest is compared with. A case that failed is missing from its
line; the CSV's status column has the reason.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import RESULTS

PICTURES = RESULTS.parents[1] / "docs" / "images"
Row = dict[str, Any]
# implementation -> label, colour (Okabe and Ito's palette, told apart by colour-blind readers),
# marker
STYLES = {
    "floor": ("GEMMs alone (floor)", "#888888", "_"),
    "gold_kernels": ("gold_kernels", "#0072B2", "o"),
    "gold_kernels_fast": ("gold_kernels, bf16 logits", "#56B4E9", "s"),
    "trl": ("TRL chunked divergence", "#D55E00", "^"),
    "liger_compiled": ("Liger chunked, compiled", "#009E73", "v"),
    "liger": ("Liger chunked", "#E69F00", "D"),
    "liger_triton": ("Liger Triton", "#CC79A7", "P"),
    "eager_compiled": ("eager, torch.compile", "#000000", "X"),
    "eager": ("eager torch", "#999933", "*"),
}
SHAPE = ("N", "V", "D_s", "D_t")
NUMBERS = (*SHAPE, "beta", "budget_bytes", "median_ms", "p20_ms", "p80_ms", "peak_extra_mib")
ERRORS = ("loss_error", "grad_hidden_error", "near_loss_error", "near_grad_hidden_error")
ERROR_TITLES = (
    "loss, random pair",
    "grad_hidden, random pair",
    "loss, teacher = student + 1 % noise",
    "grad_hidden, teacher = student + 1 % noise",
)


def read_rows(path: Path) -> list[Row]:
    """Rows of the CSV, measured or not; numbers as floats, None where there is none."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"read_rows: expected rows in {path}, got none; run bench_jsd.py first")
    for row in rows:
        for key in (*NUMBERS, *ERRORS):
            if key in row:
                row[key] = float(row[key]) if row[key] else None
    return rows


def draw_lines(axes: Axes, rows: list[Row], x: str, y: str) -> None:
    """A line for each implementation; where y is the median, a band from p20 to p80."""
    for index, (name, (label, colour, marker)) in enumerate(STYLES.items()):
        points = sorted(
            (row[x], row[y], row["p20_ms"], row["p80_ms"])
            for row in rows
            if row["implementation"] == name and row[x] is not None and row[y] is not None
        )
        if not points:
            continue
        xs, ys, lows, highs = zip(*points, strict=True)
        line = "--" if name == "floor" else "-"
        order = {"zorder": 3 - index / 10}  # ours above its peers where lines meet
        axes.plot(xs, ys, line, color=colour, marker=marker, label=label, markersize=5, **order)
        if y == "median_ms":
            axes.fill_between(xs, lows, highs, color=colour, alpha=0.2, linewidth=0)
    axes.grid(True, which="major", alpha=0.3)


def set_log_x(axes: Axes, ticks: list[float], label: str, text: Callable[[float], str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [text(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def finish(figure: Figure, panels: list[Axes], rows: list[Row], path: Path, title: str) -> None:
    """Title, one legend for all panels, and what the numbers were measured with."""
    entries = {}
    for axes in panels:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    first = rows[0]
    names = ("torch", "triton", "trl", "liger-kernel")
    versions = ", ".join(f"{name} {first[name]}" for name in names if first.get(name))
    where = f"{first['device']}; {versions}"
    figure.suptitle(f"{title}\n{where}", fontsize=9)
    columns = min(4, max(1, len(entries)))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, fontsize=8)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)


def draw_rows(rows: list[Row], folder: Path) -> Path:
    """Time and memory against N, with the head of the first row."""
    anchor = rows[0]
    same = ("part", "head", "V", "D_s", "D_t")
    chosen = [row for row in rows if all(row[key] == anchor[key] for key in same)]
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 4.6), layout="constrained")
    labels = ("forward + backward, ms", "peak above inputs and gradients, MiB")
    for axes, y, label in zip(panels, ("median_ms", "peak_extra_mib"), labels, strict=True):
        draw_lines(axes, chosen, "N", y)
        set_log_x(axes, sorted({row["N"] for row in chosen}), "N scored rows", "{:.0f}".format)
        if any(row[y] for row in chosen):  # a CPU's peak may be 0, which has no logarithm
            axes.set_yscale("log")
        axes.set_ylabel(label)
    path = folder / "jsd_rows.png"
    fixed = ", ".join(f"{key} = {anchor[key]:.0f}" for key in same[2:])
    title = f"JSD, {anchor['head']} head, {fixed}, beta = {anchor['beta']:g}"
    finish(figure, list(panels), rows, path, title)
    return path


def draw_budgets(rows: list[Row], folder: Path) -> Path:
    """Ours at the anchor with less memory."""
    anchor = rows[0]
    heads = list(dict.fromkeys(row["head"] for row in rows))
    figure, panels = plt.subplots(
        1, len(heads), figsize=(4.75 * len(heads), 4.2), layout="constrained", squeeze=False
    )
    for axes, head in zip(panels[0], heads, strict=True):
        chosen = [
            row
            for row in rows
            if row["head"] == head
            and row["part"] in ("shapes", "budgets")
            and all(row[key] == anchor[key] for key in (*SHAPE, "beta"))
        ]
        draw_lines(
            axes, [row for row in chosen if row["budget_bytes"]], "budget_bytes", "median_ms"
        )
        for row in chosen:
            if row["implementation"] == "floor" and row["median_ms"]:
                label, colour, _ = STYLES["floor"]
                axes.axhline(row["median_ms"], color=colour, linestyle="--", label=label)
        budgets = sorted({row["budget_bytes"] for row in chosen if row["budget_bytes"]})
        set_log_x(axes, budgets, "budget, MiB", lambda size: f"{size / 2**20:g}")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("forward + backward, ms")
        axes.set_title(f"{head} head", fontsize=10)
    shape = ", ".join(f"{key} = {anchor[key]:.0f}" for key in SHAPE)
    path = folder / "jsd_budget.png"
    finish(figure, list(panels[0]), rows, path, shape)
    return path


def draw_errors(rows: list[Row], folder: Path) -> Path:
    """Relative error against the float64 oracle at the anchor, first head."""
    anchor = rows[0]
    chosen = [
        row
        for row in rows
        if row["part"] in ("shapes", "betas")
        and all(row[key] == anchor[key] for key in (*SHAPE, "head"))
    ]
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 6.6), layout="constrained", sharex=True)
    for axes, field, title in zip(panels.flat, ERRORS, ERROR_TITLES, strict=True):
        draw_lines(axes, chosen, "beta", field)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
    for axes in panels[1]:
        axes.set_xlabel("beta")
    for axes in panels[:, 0]:
        axes.set_ylabel("relative error against float64")
    path = folder / "jsd_error.png"
    shape = ", ".join(f"{key} = {anchor[key]:.0f}" for key in SHAPE)
    finish(figure, list(panels.flat), rows, path, f"bf16 inputs, {shape}")
    return path


def draw_all(csv_path: Path, folder: Path) -> list[Path]:
    """The pictures drawn."""
    rows = read_rows(csv_path)
    folder.mkdir(parents=True, exist_ok=True)
    return [draw_rows(rows, folder), draw_budgets(rows, folder), draw_errors(rows, folder)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv_path", type=Path, nargs="?", default=RESULTS / "jsd.csv")
    parser.add_argument("--folder", type=Path, default=PICTURES, help="default: docs/images")
    options = parser.parse_args()
    draw_all(options.csv_path, options.folder)


if __name__ == "__main__":
    main()

"""Draw docs/images/method.png, the picture of README: the method, and the memory that it takes.

    python docs/draw_method.py

The bars are the peak_extra_mib of benchmarks/results/jsd.csv, above the inputs and the returned
gradients.
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "method.png"
RECORD = ROOT / "benchmarks" / "results" / "jsd.csv"
VOCABULARY, HIDDEN_SIZES = "151936", ("2048", "4096")
NUM_ROWS = (4096, 16384)
NAMES = {"eager": "eager PyTorch", "gold_kernels": "gold_kernels"}

STUDENT, TEACHER, GRADIENT = "#2563eb", "#d97706", "#059669"
STUDENT_PALE, TEACHER_PALE = "#dbeafe", "#fef3c7"
INK, GREY, GHOST = "#1e293b", "#64748b", "#cbd5e1"
NUM_CHUNKS, CURRENT = 6, 2  # chunks drawn, and which of them is at work, from the top
TOP, BOTTOM = 37.0, 13.0  # of the rows
CHUNK = (TOP - BOTTOM) / NUM_CHUNKS


def extra_gib(implementation: str, num_rows: int) -> float:
    """Peak extra memory of the recorded case with a trainable head and beta 0.5."""
    wanted = {
        "part": "shapes",
        "implementation": implementation,
        "head": "trainable",
        "N": str(num_rows),
        "V": VOCABULARY,
        "D_s": HIDDEN_SIZES[0],
        "D_t": HIDDEN_SIZES[1],
    }
    with RECORD.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if wanted.items() <= row.items()]
    assert len(rows) == 1, f"one row of {RECORD} is expected for {wanted}, got {len(rows)}"
    return float(rows[0]["peak_extra_mib"]) / 1024


def draw_arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str,
    bend: float = 0.0,
) -> None:
    style = f"arc3,rad={bend}"
    look = {"arrowstyle": "-|>", "mutation_scale": 17, "lw": 2, "color": color}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, connectionstyle=style, **look))


def draw_box(
    axes: Axes, x: float, y: float, width: float, height: float, face: str, edge: str, **options
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=edge, **options))


def draw_side(
    axes: Axes, name: str, hidden_x: float, hidden_width: float, logits_x: float, size: str
) -> None:
    """One model: hidden states in chunks, the head above, the logits of one chunk."""
    color, pale = (STUDENT, STUDENT_PALE) if name == "student" else (TEACHER, TEACHER_PALE)
    logits_width, head_height = 23.0, 5.5
    for chunk in range(NUM_CHUNKS):
        face = color if chunk == CURRENT else pale
        y = TOP - (chunk + 1) * CHUNK
        draw_box(axes, hidden_x, y, hidden_width, CHUNK, face, "white", lw=1.5)
    draw_box(axes, hidden_x, BOTTOM, hidden_width, TOP - BOTTOM, "none", color, lw=1.6)
    draw_box(axes, logits_x, BOTTOM, logits_width, TOP - BOTTOM, "#f8fafc", GHOST, ls="--", lw=1.4)
    draw_box(axes, logits_x, TOP - (CURRENT + 1) * CHUNK, logits_width, CHUNK, color, color)
    draw_box(axes, logits_x, TOP + 1.6, logits_width, head_height, pale, color, lw=1.6)

    middle = logits_x + logits_width / 2
    text = {"ha": "center", "va": "center", "color": INK}
    letter = name[0]
    head = f"{name} head $(V_{letter}, D_{letter})$"
    axes.text(middle, TOP + 1.6 + head_height / 2, head, fontsize=12.5, **text)
    strip = f"logits of a chunk $(C, V_{letter})$"
    y = TOP - (CURRENT + 0.5) * CHUNK
    axes.text(middle, y, strip, fontsize=11.5, **{**text, "color": "white"})
    ghost = f"full logits\n$(N, V_{letter})$\nnever exist"
    axes.text(middle, BOTTOM + 6, ghost, fontsize=12, style="italic", **{**text, "color": GREY})
    draw_arrow(axes, (middle, TOP + 1.5), (middle, TOP - CURRENT * CHUNK + 0.2), color)
    if name == "student":
        draw_arrow(axes, (hidden_x + hidden_width + 0.2, y), (logits_x - 0.1, y), color)
    else:
        draw_arrow(axes, (hidden_x - 0.2, y), (logits_x + logits_width + 0.1, y), color)
    hidden = f"{name}\nhidden\n$(N, D_{letter})$"
    axes.text(hidden_x + hidden_width / 2, TOP + 4.4, hidden, fontsize=11, **text)
    axes.text(
        hidden_x + hidden_width / 2, BOTTOM - 1.6, size, fontsize=10, **{**text, "color": GREY}
    )


def draw_method(axes: Axes) -> None:
    axes.set(xlim=(0, 100), ylim=(0, 46))
    axes.axis("off")
    draw_side(axes, "student", 5.5, 6.0, 14.5, "trained")
    draw_side(axes, "teacher", 88.5, 9.0, 62.5, "frozen")
    y = TOP - (CURRENT + 0.5) * CHUNK
    loss = FancyBboxPatch(
        (43.5, y - 4.5), 13, 9, boxstyle="round,pad=0,rounding_size=1.4", fc=INK, ec=INK
    )
    axes.add_patch(loss)
    text = {"ha": "center", "va": "center"}
    axes.text(50, y + 1.3, "row loss", fontsize=14, fontweight="bold", color="white", **text)
    axes.text(50, y - 1.8, "JSD, ULD, ...", fontsize=10.5, color="white", **text)
    draw_arrow(axes, (37.7, y + 1.2), (43.3, y + 1.2), STUDENT)
    draw_arrow(axes, (62.3, y), (56.7, y), TEACHER)
    draw_arrow(axes, (43.3, y - 1.2), (37.7, y - 1.2), GRADIENT)
    axes.text(50, y + 8.4, "softmax and loss\nin float32", fontsize=10.5, color=GREY, **text)
    draw_arrow(axes, (50, y - 4.6), (50, 15.4), INK)
    axes.text(50, 13.6, "loss, a scalar", fontsize=12.5, color=INK, fontweight="bold", **text)

    # the gradient of the chunk's logits, and what becomes of it
    axes.text(
        41.6,
        y - 7.2,
        "gradient,\nin place",
        fontsize=10.5,
        color=GRADIENT,
        fontweight="bold",
        **text,
    )
    labels = (
        (2.5, "grad hidden $(N, D_s)$\nrows of the chunk"),
        (31.5, "grad head $(V_s, D_s)$\nsummed over chunks"),
    )
    for x, label in labels:
        box = FancyBboxPatch(
            (x, 1.0), 25, 7.4, boxstyle="round,pad=0,rounding_size=1", fc="#d1fae5", ec=GRADIENT
        )
        axes.add_patch(box)
        axes.text(x + 12.5, 4.7, label, fontsize=11.5, color=INK, linespacing=1.4, **text)
    draw_arrow(axes, (17.0, y - 2.2), (17.0, 8.6), GRADIENT)
    draw_arrow(axes, (35.0, y - 2.2), (35.0, 8.6), GRADIENT)
    axes.text(
        79,
        4.7,
        "Gradients are made in the forward pass;\nbackward only multiplies them.",
        fontsize=11.5,
        linespacing=1.4,
        color=INK,
        **text,
    )
    # the loop over chunks
    draw_arrow(axes, (3.6, y + 5.5), (3.6, y - 5.5), GREY)
    axes.text(1.9, y, "next chunk", fontsize=11, color=GREY, rotation=90, **text)


def draw_memory(axes: Axes) -> None:
    bars = [(name, rows, extra_gib(name, rows)) for rows in NUM_ROWS for name in NAMES]
    ends = []
    for index, (name, rows, gib) in enumerate(bars):
        y = -index - 0.5 * (index // len(NAMES))
        color = GRADIENT if name == "gold_kernels" else "#94a3b8"
        axes.barh(y, gib, height=0.74, color=color)
        axes.text(gib + 0.5, y, f"{gib:.1f} GiB", va="center", fontsize=12, color=INK)
        axes.text(-0.6, y, NAMES[name], va="center", ha="right", fontsize=12, color=INK)
        ends.append(y)
        if index % len(NAMES) == 0:
            label = f"{rows:,}\ntokens"
            axes.text(-16, y - 0.5, label, va="center", ha="center", fontsize=12, color=INK)
    axes.set(xlim=(-19, 63), ylim=(ends[-1] - 0.6, 0.6))
    axes.axis("off")
    axes.set_title(
        "Peak memory above inputs and returned gradients, vocabulary 151,936, trainable head",
        fontsize=12.5,
        color=INK,
        loc="center",
        pad=8,
    )


def draw(path: Path) -> None:
    plt.rcParams["mathtext.fontset"] = "dejavusans"
    figure = plt.figure(figsize=(10, 7.15), facecolor="white")
    draw_method(figure.add_axes((0.0, 0.31, 1.0, 0.68)))
    draw_memory(figure.add_axes((0.03, 0.02, 0.94, 0.23)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=170, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PICTURE)
    draw(parser.parse_args().output)

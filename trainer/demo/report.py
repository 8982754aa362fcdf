"""What the demo leaves behind: a table, metrics.json, the loss curve and a contact sheet."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from gold_trainer.demo.digits import DIGIT_NAMES, Digits, parse_answer

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot as plt

COLUMNS, SHEET_ROWS = 8, 4
RIGHT, WRONG = "#1a7f37", "#cf222e"


@dataclass(frozen=True)
class DemoResult:
    """The figures of metrics.json."""

    teacher_accuracy: float
    student_accuracy_before: float
    student_accuracy_after: float
    teacher_parameters: int
    student_parameters: int
    teacher_seconds: float
    student_seconds: float
    loss_rows: int  # scored rows of one batch, the shape of the memory measurement
    eager_loss_peak_bytes: int
    fused_loss_peak_bytes: int
    held_out_pictures: int
    device: str


def print_table(result: DemoResult, console: Console) -> None:
    table = Table(title=f"Held-out pictures: {result.held_out_pictures}")
    for column in ("", "accuracy", "parameters", "training"):
        table.add_column(column, justify="left" if not column else "right")
    for name, accuracy, parameters, seconds in (
        ("teacher", result.teacher_accuracy, result.teacher_parameters, result.teacher_seconds),
        ("student before", result.student_accuracy_before, result.student_parameters, None),
        (
            "student after",
            result.student_accuracy_after,
            result.student_parameters,
            result.student_seconds,
        ),
    ):
        spent = "-" if seconds is None else f"{seconds:.0f} s"
        table.add_row(name, f"{accuracy:.1%}", f"{parameters:,}", spent)
    console.print(table)
    eager, fused = result.eager_loss_peak_bytes, result.fused_loss_peak_bytes
    console.print(
        f"Peak memory of the loss on one batch ({result.loss_rows} scored rows): "
        f"eager {eager / 2**20:.1f} MiB, fused {fused / 2**20:.1f} MiB"
    )


def write_metrics(result: DemoResult, path: Path) -> None:
    path.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


def draw_loss_curve(log: Sequence[dict[str, float]], path: Path) -> None:
    """Loss of on- and off-policy steps, and top-1 agreement with the teacher where tokens are the
    same.
    """
    is_cross = any("uld_loss" in entry for entry in log)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label, color in (
        ("off_policy_loss", "off-policy: the teacher's answers", "#0969da"),
        ("on_policy_loss", "on-policy: the student's own answers", "#bc4c00"),
    ):
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, color=color, marker=".")
    axis.set(
        xlabel="step",
        ylabel="hybrid loss per group (nats)" if is_cross else "JSD per token (nats)",
        yscale="log",
    )
    axis.grid(alpha=0.3)
    handles = axis.get_legend_handles_labels()[0]
    if not is_cross:
        agreement = axis.twinx()
        steps = [entry["step"] for entry in log]
        values = [100 * entry["top1_agreement"] for entry in log]
        agreement.plot(steps, values, color="#6e7781", linestyle="--", label="top-1 agreement")
        agreement.set(ylabel="tokens where both agree (%)", ylim=(0, 103))
        handles += agreement.get_legend_handles_labels()[0]
    axis.legend(handles=handles, loc="center right")
    axis.set_title("A student learns to read digits from its teacher, without a label")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_contact_sheet(digits: Digits, answers: Sequence[str], path: Path) -> None:
    """Held-out pictures with the student's answers, wrong ones first so that they are seen."""
    wrong = [i for i, a in enumerate(answers) if parse_answer(a) != digits.labels[i]]
    right = [i for i in range(len(answers)) if i not in set(wrong)]
    count = COLUMNS * SHEET_ROWS
    shown = (wrong[: max(count // 4, count - len(right))] + right)[:count]
    figure, axes = plt.subplots(
        SHEET_ROWS, COLUMNS, figsize=(2 * COLUMNS, 2.5 * SHEET_ROWS), layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, shown, strict=False):
        # without training it may hold anything: what no font has is written as an escape
        answer, is_right = ascii(answers[i])[1:-1], i not in set(wrong)
        axis.imshow(digits.pictures[i])
        title = answer.replace(", ", ",\n", 1) if len(answer) < 60 else answer[:40] + "..."
        if not is_right:
            title += f"\n(shown: {DIGIT_NAMES[digits.labels[i]]})"
        color = RIGHT if is_right else WRONG
        # an answer may hold $, which matplotlib would read as mathematics
        axis.set_title(title or "(no answer)", fontsize=9, color=color, parse_math=False)
    figure.suptitle(
        f"The student's answers: {len(right)} of {len(answers)} right (wrong ones first)",
        fontsize=14,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)

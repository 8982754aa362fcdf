"""The table of engines in docs/hardware.md, as results/engine_matrix.csv has it."""

import textwrap
from collections import Counter
from pathlib import Path

from support.csv_rows import csv_rows
from support.engine_matrix import ALONE, ENGINES, FACTORS

PAGE = Path(__file__).parents[2] / "docs" / "hardware.md"
WIDTH = 120
BEGIN, END = "<!-- engine_matrix.csv -->\n", "<!-- end of engine_matrix.csv -->\n"
TITLES = {"ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
LABELS = {
    "tied": "full training, tied head",
    "untied": "full training, untied head",
    "frozen": "frozen head",
    "lora": "LoRA",
    "saved": '`modules_to_save=["lm_head"]`, untied head',
    "jsd": "one tokenizer: JSD",
    "uld": "two tokenizers: hybrid ULD and cross-entropy",
    "text": "text",
    "pictures": "a picture a row",
    "mixed": "rows with 0, 1 and 2 pictures",
    "train": "training, evaluation, the saved student",
    "resumed": "a resumed run",
    "resumed_parts": "the same with `SHARDED_STATE_DICT`",
    "on_policy": "on-policy",
    "seq_kd": "`seq_kd`",
    "saved_tied_head": '`modules_to_save=["lm_head"]`, tied head',
    "own_teacher": "a student that is its own teacher",
    "bf16": "bf16, to 1e-2",
    "by_name": "student and teacher given by name",
    "mixed_media": "pictures and videos, ranks differ in which",
    "on_policy_media": "the same, on-policy",
    "seq_kd_media": "the same, `seq_kd`, a student that is its own teacher",
    "cached": "a cached teacher, ranks differ in whether they have a picture",
    "cached_means": "the same, means of a frozen head",
    "on_policy_rooms": "ranks whose completions end at different lengths",
    "on_policy_lengths": "a model whose prompts may not be padded",
    "uneven": "`num_generations`, epochs and evaluations that do not fill a batch",
    "evaluated_first": "`eval_on_start`",
    "early_evaluation": "evaluation before training",
}
LEVELS = [(factor, level) for factor, levels in FACTORS.items() for level in levels]
LEVELS += [("run", name) for name in ALONE]
Rows = list[dict[str, str]]


def refusals(rows: Rows) -> dict[tuple[str, str], str]:
    """Engine and level that is refused with whatever else -> its sentence."""
    found = {}
    for engine in ENGINES:
        for factor, level in LEVELS:
            cell = [r for r in rows if r["engine"] == engine and r[factor] == level]
            messages = {r["message"] for r in cell if r["outcome"] == "refused"}
            if len(messages) == 1 and all(r["outcome"] == "refused" for r in cell):
                found[engine, level] = messages.pop()
    return found


def table(rows: Rows) -> str:
    """A row a level: yes, where all runs with it and without a level that is refused gave the
    numbers of one process.
    """
    refused = refusals(rows)
    notes = {sentence: number for number, sentence in enumerate(dict.fromkeys(refused.values()), 1)}
    lines = ["| | " + " | ".join(TITLES[engine] for engine in ENGINES) + " |"]
    lines.append("|---" * (len(ENGINES) + 1) + "|")
    for factor, level in LEVELS:
        cells = [_cell(rows, refused, notes, engine, factor, level) for engine in ENGINES]
        lines.append(f"| {LABELS[level]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(
    rows: Rows,
    refused: dict[tuple[str, str], str],
    notes: dict[str, int],
    engine: str,
    factor: str,
    level: str,
) -> str:
    if (engine, level) in refused:
        return f"refused ({notes[refused[engine, level]]})"
    good = [
        row["outcome"] == "yes"
        for row in rows
        if row["engine"] == engine and row[factor] == level
        if not any((engine, row[other]) in refused for other in FACTORS)
    ]
    if not good:
        return "-"
    return "yes" if all(good) else f"{sum(good)} of {len(good)}"


def section(rows: Rows) -> str:
    sentences = dict.fromkeys(refusals(rows).values())
    listed = "".join(
        textwrap.fill(f"{number}. {sentence}", WIDTH, subsequent_indent="   ") + "\n"
        for number, sentence in enumerate(sentences, 1)
    )
    count = sum(row["outcome"] == "yes" for row in rows)
    commits = Counter(row["git_sha"] for row in rows).most_common()
    when = ", ".join(f"{number} at {sha}" for sha, number in commits)
    head = f"{count} runs of {len(rows)} ({when}); the others are refused, with these sentences:"
    head = textwrap.fill(head, WIDTH) + "\n\n"
    return f"{BEGIN}\n{table(rows)}\n{head}{listed}\n{END}"


def write(path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(before + section(csv_rows(path)) + after, encoding="utf-8")

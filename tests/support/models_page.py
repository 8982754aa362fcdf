"""The sweep's rows as CSV, and docs/models.md made of them."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "model_sweep.csv"
PAGE = ROOT / "docs" / "models.md"
Row = Mapping[str, str]

HEAD = """# Models

This page is made by `make sweep`, which writes `benchmarks/results/model_sweep.csv` too. It was run
with transformers {transformers} and torch {torch}, at {git_sha}.

Every architecture of `AutoModelForCausalLM` and `AutoModelForImageTextToText` is built tiny from
its config, with random weights. A micro-batch of three rows of different lengths goes the trainer's
way, as the student, with another such model as the teacher, tokenizers padding on either side. Loss
and every gradient are compared with an eager step, which runs row by row, without padding and with
full logits. Both are computed in float64, or in float32 where a model has no float64. That later
tokens change nothing before them, and that padding changes no rollout, is checked too.

| outcome | architectures |
|---|---|
| exact: loss within {max_loss} and every gradient within {max_grad} of the eager step | {exact} |
| refused by name, before or in the first step | {refused} |
| failed in another way | {failed} |
| not tried: it cannot be built tiny, or the stock model alone does not run | {not_tried} |

*With* says what the rows held: text, or text and up to two pictures a row. A model with pictures
that was tried with text has no tiny processor here; its text goes the same way. *Rollouts* says how
prompts of different lengths are written: together, padded on the left, or those of equal length
together, where padding on the left would change what the model writes. *Routers* says whether the
loss of a mixture's routers is added where the config asks for it.
"""


def write_rows(rows: Sequence[Row], path: Path = RESULTS) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def page(rows: Sequence[Row]) -> str:
    groups = {name: [row for row in rows if row["outcome"] == name] for name in OUTCOMES}
    counts = {name.replace(" ", "_"): str(len(group)) for name, group in groups.items()}
    first = {key: rows[0][key] for key in ("transformers", "torch", "git_sha")}
    bounds = {key: rows[0][key] for key in ("max_loss", "max_grad")}
    sections = [HEAD.format(**counts, **first, **bounds)]
    for name, (title, columns) in OUTCOMES.items():
        if groups[name]:
            sections.append(f"## {title}\n\n{_table(groups[name], columns)}")
    return "\n".join(sections)


# outcome -> heading, and column -> heading
_NAMES = {"model_type": "model type", "architecture": "class"}
OUTCOMES: dict[str, tuple[str, dict[str, str]]] = {
    "exact": ("Exact", _NAMES | {"tried": "with", "rollouts": "rollouts", "routers": "routers"}),
    "refused": ("Refused", _NAMES | {"reason": "message"}),
    "failed": ("Failed", _NAMES | {"tried": "with", "reason": "what came"}),
    "not tried": ("Not tried", _NAMES | {"reason": "what came"}),
}


def _table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    lines = [f"| {' | '.join(columns.values())} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row[column].replace("|", "\\|").replace("<", "&lt;") for column in columns]
        cells[0], cells[1] = f"`{cells[0]}`", f"`{cells[1]}`"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

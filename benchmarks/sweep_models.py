"""Every architecture of transformers that can be built tiny, against eager float64 steps: writes
results/model_sweep.csv and docs/models.md. With model types as arguments it prints those and
renews their rows.
"""

import sys
from pathlib import Path

from record import environment, say

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.model_sweep import MAX_GRAD_ERROR, MAX_LOSS_ERROR, Outcome, architectures, sweep
from support.models_page import PAGE, page, read_rows, write_rows


def as_rows(outcomes: list[Outcome]) -> list[dict[str, str]]:
    bounds = {"max_loss": f"{MAX_LOSS_ERROR:.0e}", "max_grad": f"{MAX_GRAD_ERROR:.0e}"}
    where = environment()
    versions = {key: where[key] for key in ("transformers", "torch", "git_sha")}
    rows = []
    for outcome in outcomes:
        values = {
            key: "" if value is None else f"{value:.1e}" if isinstance(value, float) else value
            for key, value in vars(outcome).items()
        }
        rows.append(values | bounds | versions)
    return rows


def main(wanted: list[str]) -> None:
    outcomes = sweep([case for case in architectures() if not wanted or case[0] in wanted])
    if wanted:
        for outcome in outcomes:
            say(str(outcome))
    fresh = {(row["model_type"], row["architecture"]): row for row in as_rows(outcomes)}
    if wanted:
        old = {(row["model_type"], row["architecture"]): row for row in read_rows()}
        fresh = dict(sorted({**old, **fresh}.items()))
    rows = list(fresh.values())
    write_rows(rows)
    PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

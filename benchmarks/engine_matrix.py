"""Every student, loss, kind of rows and run under every engine, on two processes of the CPU, beside
one process. Writes results/engine_matrix.csv and the table in docs/hardware.md.

--go-on keeps the rows that are there and adds the others; --table writes the table alone.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, RowLog, environment, package_versions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import engine_matrix, engine_page
from support.engine_runs import distances, try_engine

CSV = RESULTS / "engine_matrix.csv"
DISTANCES = ("losses", "norms", "eval_loss", "weights")
FIELDS = ("engine", *engine_matrix.FACTORS, "outcome", *DISTANCES, "message")
VERSIONS = ("accelerate", "peft", "deepspeed")


def run_all(scratch: Path, engine: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run all in as many launches as it takes: an error that is no refusal ends one."""
    results: dict[str, dict[str, Any]] = {}
    while left := [name for name in names if name not in results]:
        folder = Path(tempfile.mkdtemp(dir=scratch)) / "runs"
        found, stderr = try_engine(folder, engine, left)
        results |= found
        if found.keys() != set(left):
            sys.stderr.write(stderr)
            failed = left[len(found)]
            lines = [line for line in stderr.splitlines() if "Error: " in line]
            results[failed] = {"error": lines[0] if lines else "no error was seen"}
    return results


def row_of(engine: str, name: str, actual: dict[str, Any], expected: dict[str, Any]) -> dict:
    row: dict[str, Any] = {"engine": engine, "message": actual.get("error", "")}
    row |= engine_matrix.levels_of(name)
    if "error" in actual:
        is_refused = actual["error"].startswith("ValueError: ")
        row["outcome"] = "refused" if is_refused else "failed"
        row["message"] = actual["error"].removeprefix("ValueError: ")
        return row
    values = distances(actual, expected)
    row |= {key: f"{value:.1e}" for key, value in values.items()}
    relative = engine_matrix.BFLOAT16 if name == "bf16" else engine_matrix.RELATIVE
    row["outcome"] = "yes" if max(values.values()) <= relative else "differs"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--go-on", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        measure(goes_on=options.go_on)
    engine_page.write(CSV)


def measure(*, goes_on: bool) -> None:
    where = environment() | package_versions(VERSIONS)
    done = engine_page.read(CSV) if goes_on and CSV.exists() else []
    keys = {tuple(row[key] for key in ("engine", *engine_matrix.FACTORS)) for row in done}
    log = RowLog(CSV, [*FIELDS, *where], appends=goes_on)
    heads = engine_matrix.FACTORS["head"]
    groups = [[n for n in engine_matrix.names() if n.startswith(f"{h}-")] for h in heads]
    for group in [list(engine_matrix.ALONE), *groups]:
        left = {
            engine: [
                name
                for name in group
                if engine_matrix.is_a_run_of(engine, name)
                and (engine, *engine_matrix.levels_of(name).values()) not in keys
            ]
            for engine in engine_matrix.ENGINES
        }
        with tempfile.TemporaryDirectory() as scratch:
            measure_group(Path(scratch), left, log, where)


def measure_group(
    scratch: Path, left: dict[str, list[str]], log: RowLog, where: dict[str, str]
) -> None:
    by_reference: dict[str, dict[str, None]] = {"one": {}, "ddp": {}}
    for names in left.values():
        for name in names:
            reference = engine_matrix.reference_of(name)
            by_reference["ddp" if name in engine_matrix.OF_RANKS else "one"][reference] = None
    expected: dict[str, dict[str, Any]] = {}
    for engine, references in by_reference.items():
        if references:
            expected |= run_all(scratch, engine, list(references))
    for engine, names in left.items():
        for name, result in run_all(scratch, engine, names).items():
            reference = expected[engine_matrix.reference_of(name)]
            log.add(row_of(engine, name, result, reference) | where)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

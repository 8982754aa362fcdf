"""Which loss makes the better student: accuracy on held-out questions about drawn pictures.

    python benchmarks/bench_quality.py --workers 6 --rehearse --drawers 8     # one H200
    python benchmarks/bench_quality.py --small                        # two CPU cores, two minutes
    python benchmarks/bench_quality.py --report                       # table and plot from the CSV

A teacher of 45M parameters is trained from scratch on pictures that are drawn here, students of 10M
on a few labelled ones: of the teacher's family, and of another with another tokenizer. Then each
row of the table takes a copy of such a student through GOLDTrainer, with as many steps as all
others, and answers the held-out questions greedily. A seed is of what a run draws: the order of its
rows, and what is sampled. quality/ has the pieces: pictures.py the task, models.py the models,
scales.py the sizes, rows.py what is compared.

A row is written as soon as its run ends. Rows that the CSV has are not run again; --folder keeps
pictures and weights for that. A teacher that knows too little ends it: exit code 1.
"""

import argparse
import csv
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quality import pictures, rows, scales, tasks
from quality.table import report
from rich.console import Console

CONSOLE = Console(highlight=False, markup=False, soft_wrap=True)
RESULTS = Path(__file__).with_name("results")
FIELDS = (
    *("pair", "loss", "policy", "crossentropy", "seed", "status", "accuracy", *pictures.KINDS),
    *("parameters", "seconds", "tokens", "steps", "batch_size", "learning_rate"),
    *("device", "torch", "triton", "transformers", "git_sha"),
)


def draw(folder: Path, scale: Any, workers: int) -> None:
    """Pictures of each part, unless they are there."""
    for name, number, held_out in (
        ("teacher", scale.teacher_pictures, False),
        ("prompts", scale.prompts, False),
        ("held_out", scale.held_out, True),
    ):
        path = folder / f"{name}.npz"
        if not path.exists():
            drawn = pictures.ask_many(number, seed=name, held_out=held_out, workers=workers)
            pictures.save(drawn, path)


def rows_of(path: Path | None) -> list[dict[str, str]]:
    if path is None or not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


class Pools:
    """Processes for each pair: what one keeps of a run serves the next of its pair."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would share what CUDA has begun
        self.of_pair = {
            pair: ProcessPoolExecutor(workers, mp_context=context) for pair in rows.PAIRS
        }
        self.workers = workers
        for pool in self.of_pair.values():
            for _ in range(workers):
                pool.submit(tasks.warm)  # they import while pictures are drawn

    def close(self) -> None:
        for pool in self.of_pair.values():
            pool.shutdown(cancel_futures=True)

    def __getitem__(self, pair: str) -> ProcessPoolExecutor:
        return self.of_pair[pair]


def school_all(pools: Pools, folder: Path, scale: Any, options: argparse.Namespace) -> bool:
    """Weights of the teacher, which learns alone, and of the students before their runs, unless
    they are there. Other processes rehearse beside the students. False: the teacher knows too
    little.
    """
    if not (folder / "teacher.pt").exists():
        future = pools["same"].submit(tasks.school_teacher, folder, scale)
        import record  # noqa: F401  # of torch, while it learns

        numbers = future.result()
        tell(options, "teacher", rounded(numbers))
        if numbers["accuracy"] < scale.least_teacher:
            (folder / "teacher.pt").unlink()
            tell(options, f"no student is judged by a teacher below {scale.least_teacher}")
            return False
    schooled: dict[Future, str] = {}
    for pair, family in rows.STUDENT_FAMILY.items():
        others = pools.workers
        if not (folder / f"{family}.pt").exists():
            future = pools[pair].submit(tasks.school_student, folder, scale, family)
            schooled[future] = f"student {family}"
            others -= 1
        for _ in range(others if options.rehearse else 0):
            future = pools[pair].submit(tasks.rehearse, folder, scale, pair)
            future.add_done_callback(lambda done, pair=pair: tell(options, pair, done.result()))
    for future in as_completed(schooled):
        tell(options, schooled[future], rounded(future.result()))
    return True


def tell(options: argparse.Namespace, *what: Any) -> None:
    CONSOLE.print(f"{time.perf_counter() - options.started:.1f} s:", *map(str, what))


def run_all(
    pools: Pools,
    folder: Path,
    scale: Any,
    cases: list[Any],
    log: Any,
    options: argparse.Namespace,
) -> int:
    """How many cases were left out for want of time."""
    from record import environment

    where = environment()
    sizes = {k: v for k, v in asdict(scale).items() if k in FIELDS}
    running: dict[Future, Any] = {}
    waiting = list(cases)
    while waiting or running:
        busy = Counter(case.pair for case in running.values())
        is_over = time.perf_counter() - options.started > options.seconds
        for case in [] if is_over else list(waiting):
            if busy[case.pair] < pools.workers:
                busy[case.pair] += 1
                waiting.remove(case)
                running[pools[case.pair].submit(tasks.run, folder, scale, case)] = case
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            case, numbers = running.pop(future), rounded(future.result())
            log.add({**asdict(case), **sizes, **numbers, **where})
            tell(options, *case.key, numbers)
    return len(waiting)


def rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}


def measure(options: argparse.Namespace) -> int:
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    pools = Pools(options.workers)
    try:
        scale = scales.SMALL if options.small else scales.RECORD
        draw(folder, scale, options.drawers)
        tell(options, "pictures are drawn")
        done = {tuple(row[name] for name in FIELDS[:5]) for row in rows_of(options.output)}
        wanted = rows.cases_of(range(options.seeds), options.losses)
        wanted = rows.small_cases() if options.small else wanted
        cases = [case for case in wanted if case.key not in done]
        if not school_all(pools, folder, scale, options):
            return 1
        from record import RowLog

        log = RowLog(options.output, FIELDS, appends=True)
        left = run_all(pools, folder, scale, cases, log, options)
    finally:
        pools.close()
    failed = sum(row["status"] != "ok" for row in log.rows)
    tell(options, f"{len(log.rows)} rows, {failed} of them failed; {left} left out")
    return 1 if failed else 0


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a run of each kind, anywhere")
    parser.add_argument("--report", action="store_true", help="measures nothing")
    parser.add_argument("--output", type=Path, help="CSV; default: results/quality.csv")
    parser.add_argument("--folder", type=Path, help="of pictures and weights; default: a new one")
    parser.add_argument("--workers", type=int, default=1, help="processes for each of two pairs")
    parser.add_argument("--rehearse", action="store_true", help="beside the students' schooling")
    parser.add_argument("--drawers", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--seconds", type=float, default=1e9, help="no run begins after them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--losses", nargs="*", default=[], help="only these; default: all")
    options = parser.parse_args(arguments)
    options.started = time.perf_counter()
    if options.output is None and not options.small:
        options.output = RESULTS / "quality.csv"
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.report:
        CONSOLE.print(report(rows_of(options.output), options.output.with_suffix(".png")))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        options.folder = options.folder or Path(folder)
        return measure(options)


if __name__ == "__main__":
    sys.exit(main())

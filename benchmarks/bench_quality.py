"""Which loss makes the better student: accuracy on held-out questions about drawn pictures.

    python benchmarks/bench_quality.py --workers 12 --rehearse --drawers 8    # one H200
    python benchmarks/bench_quality.py --task rates --workers 12 --rehearse --drawers 8
    python benchmarks/bench_quality.py --task text --workers 6 --rehearse --drawers 8
    python benchmarks/bench_quality.py --small                        # two CPU cores, two minutes
    python benchmarks/bench_quality.py --report                       # table and plot from the CSV

A teacher of 45M parameters is trained from scratch on pictures that are drawn here, students of 10M
on a few labelled ones: of the teacher's family, and of another with another tokenizer. Then each
row of the table takes a copy of such a student through GOLDTrainer, with as many steps as all
others, and answers the held-out questions greedily. A seed is of what a run draws: the order of its
rows, and what is sampled. quality/ has the pieces: pictures.py the task, models.py the models,
scales.py the sizes, rows.py what is compared.

--task rates takes ULD and a few others through several learning rates (rate_rows.py).

--task text does the same with text: docstrings of packages that are there, a teacher of 31M from
scratch, students of 8M, and the teacher itself fake-quantised to 4 bits (texts.py, text_rows.py).
With --weights FILE.gguf the teacher is that model, and one layer of three the student (weights.py).

A row is written as soon as its run ends, what is most important first. Rows that the CSV has are
not run again; --folder keeps pictures and weights for that. Every row has the teacher's accuracy:
what a loss is worth shows only with a teacher that knows more than its student.
"""

import argparse
import csv
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from pathlib import Path
from typing import Any

from quality import rate_rows, rows, tasks, text_rows
from quality.scales import with_weights
from quality.workers import Workers, choose
from rich.console import Console

CONSOLE = Console(highlight=False, markup=False, soft_wrap=True)
RESULTS = Path(__file__).with_name("results")
PLOTS = Path(__file__).parents[1] / "docs" / "images"
TASKS: dict[str, Any] = {"pictures": rows, "rates": rate_rows, "text": text_rows}


def fields_of(task: Any) -> tuple[str, ...]:
    """Columns of its CSV."""
    return (
        *(*task.KEYS, "status", *task.NUMBERS, "parameters", "seconds", "tokens"),
        *("steps", "batch_size", "learning_rate"),
        *("device", "torch", "triton", "transformers", "git_sha", *task.LAST),
    )


def rows_of(path: Path | None) -> list[dict[str, str]]:
    if path is None or not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def school_all(workers: Workers, folder: Path, scale: Any, options: argparse.Namespace) -> None:
    """Weights of the teacher, which learns nearly alone unless the task has all of it side by side,
    and of the students before their runs, unless they are there. Other workers rehearse, so that
    kernels are compiled and kept: one of each pair beside the teacher, the others beside students.
    """
    rehearsed = {0}  # the teacher's worker has the least to do before the runs

    def rehearse(place: int) -> None:
        if options.rehearse and place not in rehearsed:
            rehearsed.add(place)
            pair = workers.pairs[place]
            future = workers.submit(place, tasks.rehearse, folder, scale, pair)
            future.add_done_callback(lambda done: tell(options, place, pair, done.result()))

    is_side_by_side = options.task.IS_SIDE_BY_SIDE
    schooled: dict[Future, str] = {}
    if not (folder / "teacher.pt").exists():
        future = workers.submit(0, tasks.school_teacher, folder, scale)
        if is_side_by_side:
            schooled[future] = "teacher"
        else:
            for place in (1, 3):
                if place < len(workers):
                    rehearse(place)
            tell(options, "teacher", rounded(future.result()))
    for pair, family in options.task.STUDENTS.items():
        if not (folder / f"{family}.pt").exists():
            place = workers.first_of(pair, after=int(is_side_by_side))
            future = workers.submit(place, tasks.school_student, folder, scale, family)
            schooled[future] = f"student {family}"
    for place in range(len(workers)):
        rehearse(place)
    import record  # noqa: F401  # of torch, while they learn

    for future in as_completed(schooled):
        tell(options, schooled[future], rounded(future.result()))


def tell(options: argparse.Namespace, *what: Any) -> None:
    CONSOLE.print(f"{time.perf_counter() - options.started:.1f} s:", *map(str, what))


def run_all(
    workers: Workers,
    folder: Path,
    scale: Any,
    cases: list[Any],
    log: Any,
    options: argparse.Namespace,
) -> int:
    """How many cases were left out for want of time."""
    from record import environment

    where = environment()
    sizes = {name: getattr(scale, name) for name in ("steps", "batch_size", "learning_rate")}
    running: dict[Future, tuple[int, Any]] = {}
    idle, waiting = set(range(len(workers))), list(cases)
    while waiting or running:
        is_over = time.perf_counter() - options.started > options.seconds
        while idle and waiting and not is_over:
            place = idle.pop()
            case = choose(waiting, workers.pairs[place])
            waiting.remove(case)
            workers.pairs[place] = case.pair
            running[workers.submit(place, tasks.run, folder, scale, case)] = place, case
        if not running:
            break
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            place, case = running.pop(future)
            idle.add(place)
            numbers = rounded(what_came(future))
            if numbers.pop("is_lost", False):
                workers.renew(place)
            keys = dict(zip(options.task.KEYS, case.key, strict=True))
            log.add({**keys, **sizes, **numbers, **where})
            tell(options, *case.key, numbers)
    return len(waiting)


def what_came(future: Future) -> dict[str, Any]:
    """A worker that dies in a run leaves a row as well."""
    try:
        return future.result()
    except Exception as error:
        return {"status": f"{type(error).__name__}: {error}"[: tasks.MOST_STATUS], "is_lost": True}


def rounded(numbers: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in numbers.items()}


def measure(options: argparse.Namespace) -> int:
    folder, task = options.folder, options.task
    folder.mkdir(parents=True, exist_ok=True)
    workers = Workers(options.workers, task.TURNS)
    try:
        scale = task.SCALES["small" if options.small else "record"]
        if options.weights:
            scale = with_weights(scale, options.weights)
        task.draw(folder, scale, options.drawers)
        tell(options, "data is made")
        done = {tuple(row[name] for name in task.KEYS) for row in rows_of(options.output)}
        wanted = task.cases_of(range(options.seeds), options.losses)
        wanted = task.small_cases() if options.small else wanted
        cases = [case for case in wanted if case.key not in done]
        school_all(workers, folder, scale, options)
        from record import RowLog

        log = RowLog(options.output, fields_of(task), appends=True)
        left = run_all(workers, folder, scale, cases, log, options)
    finally:
        workers.close()
    failed = sum(row["status"] != "ok" for row in log.rows)
    tell(options, f"{len(log.rows)} rows, {failed} of them failed; {left} left out")
    return 1 if failed else 0


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="pictures")
    parser.add_argument("--weights", type=Path, help="of text: a GGUF file, the teacher")
    parser.add_argument("--small", action="store_true", help="a run of each kind, anywhere")
    parser.add_argument("--report", action="store_true", help="measures nothing")
    parser.add_argument("--output", type=Path, help="CSV; default: one of results/")
    parser.add_argument("--folder", type=Path, help="of pictures and weights; default: a new one")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--rehearse", action="store_true", help="beside the students' schooling")
    parser.add_argument("--drawers", type=int, default=1, help="processes that draw pictures")
    parser.add_argument("--seconds", type=float, default=1e9, help="no run begins after them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--losses", nargs="*", default=[], help="only these; default: all")
    options = parser.parse_args(arguments)
    options.started = time.perf_counter()
    options.task = TASKS[options.task]
    if options.weights and options.task is not text_rows:
        parser.error("--weights is of --task text")
    if options.output is None and not options.small:
        name = "quality_weights.csv" if options.weights else options.task.OUTPUT
        options.output = RESULTS / name
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.report:
        is_record = options.output.resolve().parent == RESULTS.resolve()
        folder = PLOTS if is_record else options.output.parent
        picture = folder / options.output.with_suffix(".png").name
        CONSOLE.print(options.task.report(rows_of(options.output), picture))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        options.folder = options.folder or Path(folder)
        return measure(options)


if __name__ == "__main__":
    sys.exit(main())

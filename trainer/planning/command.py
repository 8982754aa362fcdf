"""`gold-trainer plan`: the peak memory of a run, by part, before any weights are read."""

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from gold_trainer.command_line import Run, named_fields, read_run
from gold_trainer.planning.memory import (
    ENGINES,
    PARTS,
    Plan,
    Planner,
    Setup,
    Subject,
    optimizer_of,
)
from gold_trainer.planning.remedies import Remedy, remedies
from gold_trainer.planning.subject import find_subject, trained_numbers
from gold_trainer.planning.uncounted import uncounted

GIB = 2**30
FREE = 0.05  # of a GPU, for what allocators round up and CUDA itself takes


def plan(argv: list[str]) -> int:
    """0, or 1 where the run does not fit the GPU; ValueError for what the user can mend."""
    setup, num_tokens, argv = _own_arguments(argv)
    run = read_run(argv)
    _assume_bf16(run, argv)
    found = find_subject(run, num_tokens)
    planner = Planner(found.subject, setup)
    result = planner.plan()
    console = Console(highlight=False)
    for name, model in (("student", found.subject.student), ("teacher", found.subject.teacher)):
        source = run.student if name == "student" else run.teacher
        numbers = _elsewhere(found.subject) if model is None else _numbers(model)
        console.print(f"{name}: {source}, {numbers}", markup=False, soft_wrap=True)
    for line in (f"a micro-batch: {found.assumption}", _precision(run, setup)):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_table(result))
    for line in uncounted(run.config, setup):
        console.print(line, markup=False, soft_wrap=True)
    if setup.gpu_bytes is None:
        return 0
    return _fit(console, planner, result, setup.gpu_bytes)


def _own_arguments(argv: list[str]) -> tuple[Setup, int | None, list[str]]:
    """The setup, tokens of a row, and arguments of the run."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--engine")
    parser.add_argument("--gpus", default="1")
    parser.add_argument("--gpu_memory", "--gpu-memory")
    parser.add_argument("--tokens")
    own, argv = parser.parse_known_args(argv)
    num_gpus = _number("gpus", own.gpus, "processes, one a GPU")
    engine = own.engine or ("single" if num_gpus == 1 else "ddp")
    if engine not in ENGINES:
        raise ValueError(
            f"gold-trainer plan: engine must be one of {', '.join(ENGINES)}, got {engine!r}; "
            "single is one process without a launcher."
        )
    if engine == "single" and num_gpus > 1:
        raise ValueError(
            f"gold-trainer plan: gpus must be 1 for the engine single, got {num_gpus}; choose one "
            f"of {', '.join(ENGINES[1:])}."
        )
    gpu_bytes = None if own.gpu_memory is None else int(_gib(own.gpu_memory) * GIB)
    num_tokens = None if own.tokens is None else _number("tokens", own.tokens, "a row")
    return Setup(engine, num_gpus, gpu_bytes), num_tokens, argv


def _number(name: str, text: str, what: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"gold-trainer plan: {name} must be a whole number above 0, got {text!r}; it counts "
            f"{what}."
        )
    return int(text)


def _gib(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise ValueError(
            f"gold-trainer plan: gpu_memory must be a number of GiB above 0, got {text!r}; for "
            "instance 24."
        )
    return size


def _assume_bf16(run: Run, argv: list[str]) -> None:
    """Set bf16 where nothing says the precision: this machine may have no GPU, the one of the run
    has.
    """
    if not named_fields(argv) & {"bf16", "fp16", "use_cpu"}:
        run.config.bf16 = True


def _precision(run: Run, setup: Setup) -> str:
    args = run.config
    mixed = next((name for name in ("bf16", "fp16") if getattr(args, name)), "float32")
    checkpointing = "on" if args.gradient_checkpointing else "off"
    gpus = f"{setup.num_gpus} GPU" + "s" * (setup.num_gpus > 1)
    return (
        f"engine {setup.engine}, {gpus}; {mixed}; gradient_checkpointing is {checkpointing}; "
        f"optim={optimizer_of(args)}"
    )


def _elsewhere(subject: Subject) -> str:
    """Where a teacher is that is not in this process."""
    if subject.stored is None or subject.args.teacher_cache is None:
        return "in its server"
    return f"from its cache, {subject.stored.num_bytes} bytes a scored token"


def _numbers(model: Any) -> str:
    total, trained = trained_numbers(model)
    text = f"{total / 1e9:.3g}B parameters"
    return f"{text}, {trained / 1e6:.4g}M of them trained" if trained else text


def _table(result: Plan) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for part in PARTS:
        if result.parts[part] > result.total / 1000:
            table.add_row(part, _size(result.parts[part]))
    table.add_row("peak", f"{_size(result.total)} a GPU, in the {result.moment}")
    return table


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _fit(console: Console, planner: Planner, result: Plan, gpu_bytes: int) -> int:
    room = int(gpu_bytes * (1 - FREE))
    total = f"{gpu_bytes / GIB:g} GiB"
    if result.total <= room:
        console.print(f"fits in {total}, of which {FREE:.0%} are left free", markup=False)
        return 0
    console.print(f"does not fit in {total}, of which {FREE:.0%} are left free; add, in order:")
    found = remedies(planner, room)
    for remedy in found:
        console.print(f"  {_line(remedy)}", markup=False, soft_wrap=True)
    is_enough = bool(found) and found[-1].total <= room
    if not is_enough:
        console.print("which is not enough: take shorter rows (max_length) or more GPUs")
    return 1


def _line(remedy: Remedy) -> str:
    return f"{remedy.lines:58} # {_size(remedy.total)}; {remedy.cost}"

"""Ranks that wait for each other forever end, and say where they waited."""

import ast

from support.forks import TESTS
from support.processes import start_ranks


def test_a_hang_prints_the_stacks_of_every_rank_and_ends_them():
    done = start_ranks("hanging_step", 2, seconds=10)
    assert done.returncode != 0
    assert done.stderr.count("Timeout (0:00:10)!") == 2
    for name in ("wait_for_nobody", "wait_for_the_other"):
        assert f"in {name}\n" in done.stderr


def test_nothing_else_starts_ranks():
    """So that none can hang without a word."""
    starts = [
        path.relative_to(TESTS).as_posix()
        for path in sorted(TESTS.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in STARTERS
    ]
    assert set(starts) == {"support/processes.py"}


STARTERS = ("torch.distributed" + ".run", "accelerate.commands" + ".launch", "torch" + "run")

"""Runs that are killed at random moments, half of them within a save, and go on by themselves.

python tests/support/soak.py 20  # kills; make soak
"""

import hashlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from gold_trainer.survival import checkpoints
from support.forks import Forked
from support.resumed_runs import FIELDS
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer

SAVE_SECONDS = 0.06  # a save of the tiny model takes about 0.03 s


def run(output_dir, num_steps, kill, seed, step_seconds):
    """In a process of its own: train to the end, or until the kill; prints digest and seconds.

    kill: "save", within the save of one of the next steps; "any", at any moment of the next three
    steps; "disk", a file cannot grow beyond some size; "", none.
    """
    torch.set_num_threads(1)
    draw = random.Random(seed)
    fields = FIELDS | {
        "max_steps": num_steps,
        "lmbda": 0.5,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "disable_dropout": False,
    }
    rows = tiny_rows(11, images="mixed")
    trainer = make_trainer(output_dir, rows, **fields)
    if kill == "save":
        _kill_within_save(draw)
    elif kill == "any":
        trainer.add_callback(_KillBetween(draw.uniform(0.0, 3.0) * step_seconds))
    elif kill == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint="auto")
    digest = hashlib.sha256()
    for weight in trainer.model.state_dict().values():
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    print(json.dumps([digest.hexdigest(), time.perf_counter() - started]))  # noqa: T201


def _kill_after(seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


class _KillBetween(TrainerCallback):
    """Some seconds after the first step has begun."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_begin(self, args, state, control, **kwargs):
        if self.seconds is not None:
            _kill_after(self.seconds)
            self.seconds = None


def _kill_within_save(draw):
    """The first of the next two saves or the second, at its start, in its middle or at its end."""
    clear, left = checkpoints.clear, [draw.randrange(2)]

    def clear_and_die(folder):
        clear(folder)
        if left[0] == 0:
            _kill_after(draw.uniform(0.0, SAVE_SECONDS))
        left[0] -= 1

    checkpoints.clear = clear_and_die


def soak(folder, num_kills, seed=0, say=lambda text: None):
    """How many of the kills fell into a save; AssertionError where a run does not go on alone or
    ends with other weights than the uninterrupted one.
    """
    num_steps = 2 * num_kills + 4

    def process(name, kill="", number=0):
        """How it ended, and what it wrote last."""
        arguments = (str(folder / name), num_steps, kill, f"{seed} {number}", step)
        output = folder / f"output of {name} {number} {kill}"
        worker = Forked(output, "support.soak", "run", *map(str, arguments))
        return worker.wait(300), worker.stdout.splitlines()[-1:]

    step = 0.0
    code, last = process("whole")
    assert code == 0
    expected, seconds = json.loads(*last)
    step = seconds / num_steps
    within, killed = 0, 0
    for number in range(4 * num_kills):
        kill = "save" if within < (killed + 1) / 2 else "any"
        started = time.time()
        code, _ = process("killed", kill, number)
        assert code in (0, -signal.SIGKILL), f"run {number} ended with {code}"
        if code == 0:
            break  # it was done before its kill came
        killed += 1
        broken = [
            path.name
            for path in checkpoints.checkpoints_in(folder / "killed")
            if not (path / checkpoints.MARK).is_file() and path.stat().st_mtime > started
        ]
        within += bool(broken)
        newest, _ = checkpoints.find_newest(folder / "killed")
        say(f"kill {killed} ({kill}): incomplete {broken or 'nothing'}, complete {newest}")
        if killed == num_kills:
            break
    assert killed == num_kills, f"{killed} kills of {num_kills}: the run was over too early"
    assert process("killed", "disk")[0] == 1, "a save beyond the limit must fail"
    say("disk full: refused")
    code, last = process("killed")
    assert code == 0
    assert json.loads(*last)[0] == expected, (
        "the weights differ from those of the uninterrupted run"
    )
    return within


def main(what="20", *arguments):
    if what == "run":
        output_dir, num_steps, kill, seed, step_seconds = arguments
        run(output_dir, int(num_steps), kill, seed, float(step_seconds))
        return
    with tempfile.TemporaryDirectory() as folder:
        within = soak(Path(folder), int(what), say=lambda text: print(text, flush=True))  # noqa: T201
    print(f"{what} kills, {within} within a save: the weights are the same")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])

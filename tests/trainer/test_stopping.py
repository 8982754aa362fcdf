"""Signals and errors end a run with a checkpoint, one line and an exit code."""

import json
import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerControl

from gold_trainer import command_line
from gold_trainer.__main__ import main
from gold_trainer.objectives import same_vocabulary
from gold_trainer.survival.checkpoints import what_is_wrong
from gold_trainer.survival.stopping import Stopper
from support.forks import Forked
from support.resumed_runs import FIELDS, assert_same_run
from support.tiny_models import save_tiny_pair, tiny_rows
from support.trainer_cases import make_trainer

ROWS = tiny_rows(11, images="mixed")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A whole command but for its output_dir."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_pair(folder, "qwen3_vl")
    rows = tiny_rows(8, images=0)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        *("--model_name_or_path", str(folder / "student")),
        *("--teacher_model_name_or_path", str(folder / "teacher")),
        *("--dataset_name", str(folder / "rows.jsonl")),
        *("--per_device_train_batch_size", "2", "--max_steps", "100000", "--lmbda", "0"),
        *("--max_completion_length", "8", "--max_length", "128", "--report_to", "none"),
        *("--learning_rate", "1e-3", "--use_cpu", "--logging_steps", "1"),
    ]


def stopped(command, folder, number, code, is_to_all=False):
    """What a run wrote to stderr and stdout that got a signal after its first step, or it and the
    processes that it has started.
    """
    run = Forked(folder / "output", "gold_trainer", "train", *command)
    run.wait_until(lambda: "'loss'" in run.stdout or run.poll() is not None)
    (os.killpg if is_to_all else os.kill)(run.pid, number)
    assert run.wait(120) == code, run.stderr
    return run.stderr, run.stdout


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_signal_ends_the_command_with_a_checkpoint_one_line_and_its_exit_code(
    number, code, flags, tmp_path
):
    err, out = stopped([*flags, "--output_dir", str(tmp_path)], tmp_path, number, code)
    assert "Traceback" not in err + out
    (line,) = [line for line in err.splitlines() if "is complete" in line]
    match = re.search(rf"stopped by {number.name} after step (\d+); (\S+) is complete", line)
    (folder,) = tmp_path.glob("checkpoint-*")
    assert match[2] == str(folder) and folder.name == f"checkpoint-{match[1]}"
    assert what_is_wrong(folder) is None
    assert not (tmp_path / ".running.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_the_workers_of_the_data_loader_too_ends_alike(number, code, flags, tmp_path):
    """As a terminal and a cluster send it: to all processes of the run."""
    command = [*flags, "--output_dir", str(tmp_path), "--dataloader_num_workers", "2"]
    err, out = stopped(command, tmp_path, number, code, is_to_all=True)
    assert "Traceback" not in err + out
    assert len([line for line in err.splitlines() if "is complete" in line]) == 1, err
    (folder,) = tmp_path.glob("checkpoint-*")
    assert what_is_wrong(folder) is None


def test_signals_that_somebody_else_handles_stay_theirs():
    stopper = Stopper()
    numbers = (signal.SIGHUP, signal.SIGUSR1)
    before = [signal.signal(n, h) for n, h in zip(numbers, (signal.SIG_IGN, print), strict=True)]
    try:
        stopper.install()  # as under nohup, and below a library that submits jobs again
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN, print]
        stopper.uninstall()
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        stopper.install()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopper.signal == signal.SIGUSR1
        stopper.uninstall()
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_DFL] * 2
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_run_in_another_thread_leaves_signals_alone():
    stopper, before = Stopper(), signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(stopper.install).result()
        assert signal.getsignal(signal.SIGTERM) is before
        pool.submit(stopper.uninstall).result()


def test_a_signal_is_noted_where_the_run_is_and_stderr_is_closed(monkeypatch):
    def closed(*args):
        raise OSError("no terminal")

    stopper = Stopper()
    monkeypatch.setattr(os, "write", closed)
    monkeypatch.setattr(os, "getpid", lambda: -1)  # in a worker, which has inherited the handler
    stopper._handle(signal.SIGTERM, None)
    assert stopper.signal is None
    monkeypatch.undo()
    monkeypatch.setattr(os, "write", closed)
    try:
        stopper._handle(signal.SIGTERM, None)
    finally:
        stopper.uninstall()
    assert stopper.signal == signal.SIGTERM


def test_ctrl_c_alone_ends_a_run_at_once_and_only_behind_another_signal(monkeypatch):
    told, stopper = [], Stopper()
    monkeypatch.setattr(os, "write", lambda file, text: told.append(text))
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            stopper._handle(number, None)
        with pytest.raises(KeyboardInterrupt):
            stopper._handle(signal.SIGINT, None)
    finally:
        stopper.uninstall()
    assert [b"Ctrl-C again stops at once" in text for text in told] == [True, False]


@pytest.mark.parametrize(("world_size", "stops"), [(1, True), (2, False)])
def test_several_processes_agree_on_the_step_before_one_stops(world_size, stops):
    """One that stopped by itself would leave the others in a collective call."""
    stopper, control = Stopper(), TrainerControl()
    args = SimpleNamespace(world_size=world_size, save_strategy="steps")
    stopper.on_step_end(args, None, control)
    assert not control.should_training_stop
    stopper.signal = signal.SIGTERM
    stopper.on_step_end(args, None, control)
    assert stopper.must_stop == control.should_training_stop == control.should_save == stops


def test_nothing_is_saved_of_weights_in_between_nor_within_a_save(caplog):
    stopper, saved = Stopper(), []
    save = partial(saved.append, None)
    assert not stopper.save_after(save), "no step was taken"
    stopper.weights_are_whole = True
    assert stopper.save_after(save) and len(saved) == 1
    stopper.remember()
    expected = torch.rand(1), np.random.rand(), random.random()
    assert stopper.save_after(save)
    assert expected == (torch.rand(1), np.random.rand(), random.random())
    stopper.is_saving = True
    assert not stopper.save_after(save) and len(saved) == 2
    stopper.is_saving = False
    stopper.on_pre_optimizer_step(None, None, None)
    assert not stopper.save_after(save)
    stopper.weights_are_whole = True
    assert not stopper.save_after(lambda: 1 / 0), "the error before it is the one to report"
    assert "no checkpoint could be saved after the error: division by zero" in caplog.text


class SignalAt:
    """Sends this process a signal within a step: in the loss of a micro-batch."""

    def __init__(self, monkeypatch, number, call):
        self.number, self.left = number, call
        self.fused = same_vocabulary.fused_linear_loss
        monkeypatch.setattr(same_vocabulary, "fused_linear_loss", self)

    def __call__(self, *args, **options):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
            time.sleep(0.01)
        return self.fused(*args, **options)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_run_that_a_signal_stopped_goes_on_to_the_same_weights(
    number, error, tmp_path, monkeypatch
):
    options = FIELDS | {"lmbda": 0.5, "save_strategy": "steps", "save_steps": 100}
    whole = make_trainer(tmp_path / "whole", ROWS, **options)
    whole.train()
    before = signal.getsignal(number)
    trainer = make_trainer(tmp_path, ROWS, **options)
    with monkeypatch.context() as patch:
        SignalAt(patch, number, call=5)  # the first micro-batch of step 3
        with pytest.raises(error):
            trainer.train()
    assert trainer.state.global_step == 3
    assert signal.getsignal(number) is before
    assert what_is_wrong(tmp_path / "checkpoint-3") is None
    resumed = make_trainer(tmp_path, ROWS, **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole)


def test_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, ROWS, **(FIELDS | {"save_strategy": "steps"}))
    fused, calls = same_vocabulary.fused_linear_loss, []

    def interrupted(*args, **options):
        calls.append(None)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return fused(*args, **options)

    monkeypatch.setattr(same_vocabulary, "fused_linear_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(calls) == 2 and trainer.state.global_step == 0


def test_save_strategy_no_means_no_checkpoint_and_says_so(tmp_path, monkeypatch, caplog):
    trainer = make_trainer(tmp_path, ROWS, **FIELDS)
    SignalAt(monkeypatch, signal.SIGTERM, call=1)
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == 143
    assert "after step 1; there is no checkpoint (save_strategy is 'no')" in caplog.text
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("CUDA error\nmore"), 1), (ValueError("row 5: bad"), 2)]
)
def test_error_within_a_step_is_one_line_and_an_exit_code(
    error, code, flags, tmp_path, monkeypatch, capfd
):
    fused, calls = same_vocabulary.fused_linear_loss, []

    def failing(*args, **options):
        calls.append(None)
        if len(calls) == 3:
            raise error
        return fused(*args, **options)

    monkeypatch.setattr(same_vocabulary, "fused_linear_loss", failing)
    assert main(["train", *flags, "--output_dir", str(tmp_path)]) == code
    err = capfd.readouterr().err
    assert "Traceback" not in err and err.count("error: ") == 1
    if code == 1:
        assert "error: RuntimeError: CUDA error (traceback: " in err
        saved = Path(re.search(r"traceback: (\S+)\)", err)[1])
        assert "fused_linear_loss" in saved.read_text()
        saved.unlink()
    assert what_is_wrong(tmp_path / "checkpoint-2") is None


@pytest.mark.parametrize("word", ["true", "True", "auto"])
def test_resume_from_the_newest_checkpoint_by_a_word(word, flags, tmp_path):
    options = ["--output_dir", str(tmp_path), "--save_steps", "1"]
    assert main(["train", *flags, *options, "--max_steps", "2"]) == 0
    state = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt")
    assert (
        main(["train", *flags, *options, "--max_steps", "3", "--resume_from_checkpoint", word]) == 0
    )
    later = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt")
    steps = [float(next(iter(part["state"].values()))["step"]) for part in (state, later)]
    assert steps == [2, 3]


def test_resume_word_where_nothing_is_saved_is_one_message(flags, tmp_path, capfd):
    options = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "true"]
    assert main(["train", *flags, *options]) == 2
    assert "needs a complete checkpoint in output_dir, got none" in capfd.readouterr().err


def test_interrupt_before_the_first_step_is_one_line(flags, tmp_path, monkeypatch, capfd):
    def load_rows(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "load_rows", load_rows)
    assert main(["train", *flags, "--output_dir", str(tmp_path)]) == 130
    assert capfd.readouterr().err.strip() == "error: interrupted"


def test_an_error_in_the_first_step_says_that_there_is_no_checkpoint_yet(
    tmp_path, monkeypatch, caplog
):
    trainer = make_trainer(tmp_path, ROWS, **FIELDS | {"save_strategy": "steps"})

    def failing(*args, **options):
        raise RuntimeError("of the first step")

    monkeypatch.setattr(same_vocabulary, "fused_linear_loss", failing)
    with pytest.raises(RuntimeError, match="of the first step"):
        trainer.train()
    assert "RuntimeError in step 1; there is no checkpoint yet." in caplog.text


def test_an_error_within_a_save_names_the_checkpoint_and_no_step(tmp_path, monkeypatch, caplog):
    trainer = make_trainer(tmp_path, ROWS, **FIELDS | {"save_strategy": "steps", "save_steps": 1})

    def failing(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.model, "save_pretrained", failing)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert "OSError while checkpoint-1 was saved; there is no checkpoint yet." in caplog.text

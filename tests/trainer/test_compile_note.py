"""A run says in its progress bar that it compiles, and what that has cost."""

import time

import pytest
from transformers import ProgressCallback, TrainerCallback

from gold_trainer.speed import compiling
from gold_trainer.writers import local
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer


class Bars(TrainerCallback):
    """What the bar has beside it when a step ends."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, *args, **kwargs):
        (shown,) = (c for c in self.callbacks if isinstance(c, ProgressCallback))
        bar = shown.training_bar
        self.seen.append((bar.desc, bar.postfix))


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_compiling_is_said_while_it_lasts_and_when_it_is_over(
    disable_tqdm, graphs, monkeypatch, capsys, tmp_path
):
    backend, while_compiling = compiling.BACKEND, []

    def slow(graph, examples):
        time.sleep(0.2)
        while_compiling.append(trainer.fast.compiled.note.bar)
        return backend(graph, examples)

    monkeypatch.setattr(compiling, "BACKEND", slow)
    fields = {"max_steps": 2, "compile_models": "regional", "disable_tqdm": disable_tqdm}
    trainer = make_trainer(tmp_path, tiny_rows(8), "qwen3", **fields)
    bars = Bars()
    bars.callbacks = trainer.callback_handler.callbacks
    if not disable_tqdm:
        trainer.add_callback(bars)
    trainer.train()
    shown = capsys.readouterr()
    kinds = "Qwen3DecoderLayer of the student, Qwen3DecoderLayer of the teacher"
    assert shown.out.count(f"  compiled   {kinds} in ") == 1
    assert all((bar is None) == disable_tqdm for bar in while_compiling) and while_compiling
    seconds = trainer.fast.compiled.note.all_seconds
    assert seconds > 0.4, "two kinds"
    assert ("compiling:   0%" in shown.err) != disable_tqdm
    expected = [(desc, f"{seconds:.0f} s of compiling") for desc in ("", "")]
    assert bars.seen == ([] if disable_tqdm else expected)


def test_what_a_writer_compiles_is_said_in_the_bar_too(graphs, monkeypatch, capsys, tmp_path):
    check = local.check_step

    def slow(*args):
        time.sleep(0.3)
        check(*args)

    monkeypatch.setattr(local, "check_step", slow)
    rows = [{**row, "messages": row["messages"][:1]} for row in tiny_rows(4)]
    fields = {"max_steps": 1, "lmbda": 1.0, "rollout_compile": True, "disable_tqdm": False}
    trainer = make_trainer(tmp_path, rows, "qwen3", **fields)
    bars = Bars()
    bars.callbacks = trainer.callback_handler.callbacks
    trainer.add_callback(bars)
    trainer.train()
    shown = capsys.readouterr()
    seconds = trainer.rollouts.writers["student"].compile_seconds
    assert seconds > 0.3 and graphs
    assert "compiling:   0%" in shown.err
    assert bars.seen == [("", f"{seconds:.0f} s of compiling")]
    assert f"{seconds:.1f} s compiling a layer" in shown.out

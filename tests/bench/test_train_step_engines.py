"""Steps of engines and teachers are measured a length at a time, and no row is lost."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_train_step as bench
import teacher_kinds
import train_step_engines as engines
from record import RESULTS, RowLog

from gold_trainer.__main__ import main as gold_trainer

LAUNCH = engines.Launch("single", "resident", "lora", "on")
LENGTHS = [16, 24]


def options_of(*arguments: str) -> argparse.Namespace:
    options = bench.parse_options(["--tiny", "--engine", "single", *arguments])
    options.completion_tokens = options.completion_tokens or LENGTHS
    return options


def rows_in(text: str) -> list[dict]:
    lines = [line for line in text.splitlines() if line.startswith(engines.ROW)]
    return [json.loads(line.removeprefix(engines.ROW)) for line in lines]


def launched(monkeypatch, program: str, *arguments: str) -> list[dict]:
    """The rows of a launch whose processes run this program."""
    monkeypatch.setattr(engines, "command_of", lambda *_: [sys.executable, "-c", program])
    options = options_of(*arguments)
    return list(engines.run(LAUNCH, options, Path(), options.seconds))


def said(**row: object) -> str:
    return f"print({engines.ROW + json.dumps(row)!r}, flush=True);"


def test_one_trainer_measures_every_length_with_its_own_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "STEPS", 3)
    options = options_of("--batch-size", "2", "--set", "loss_budget_mib=1", "optim=sgd")
    seen = []
    compute_loss = engines.InOrder.compute_loss

    def counted(self, model, inputs, *args, **kwargs):
        seen.append(len(inputs.student.labels))
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(engines.InOrder, "compute_loss", counted)
    assert engines.work(LAUNCH, options, tmp_path) == 0
    rows = rows_in(capsys.readouterr().out)
    assert [row["completion_tokens"] for row in rows] == LENGTHS
    assert seen == [16] + [32] * 3 + [48] * 3  # the oracle's sample, and batches of two
    for row in rows:
        assert row["status"] == "ok" and row["seconds_median"] > 0 and row["num_gpus"] == 1
        assert float(row["loss_error"]) < 1e-5 and float(row["grad_norm"]) > 0
        assert row["options"] == "loss_budget_mib=1 optim=sgd"


def test_teachers_from_a_folder_teach_what_the_resident_one_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "STEPS", 1)
    monkeypatch.setattr(engines, "WARM_UP_STEPS", 0)
    options = options_of("--batch-size", "2", "--completion-tokens", "16")
    teacher_kinds.save_teacher(tmp_path, is_tiny=True)
    command = teacher_kinds.cache_command(tmp_path, options, num_rows=2)
    assert gold_trainer(command[command.index("gold_trainer") + 1 :]) == 0
    for teacher in ("resident", "offload", "cache"):
        engines.work(LAUNCH._replace(teacher=teacher), options, tmp_path)
    resident, *others = rows_in(capsys.readouterr().out)
    assert [row["teacher"] for row in others] == ["offload", "cache"]
    assert {row["status"] for row in others} == {"ok"}
    for row in others:
        assert float(row["first_loss"]) == pytest.approx(float(resident["first_loss"]), rel=1e-3)


def test_full_training_trains_float32_weights_without_the_vision_tower(tmp_path):
    trainer = engines.trainer_of(LAUNCH._replace(training="full"), options_of(), tmp_path)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained and not any("visual" in name or "lora" in name for name in trained)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_a_loss_beyond_the_oracle_gets_no_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "loss_error", lambda trainer: float("nan"))
    assert engines.work(LAUNCH, options_of(), tmp_path) == 1
    (row,) = rows_in(capsys.readouterr().out)
    assert row["status"] == "refused: loss error nan exceeds 0.0001"


def test_out_of_memory_costs_the_longer_lengths_of_its_launch(monkeypatch):
    program = said(completion_tokens=16, status="ok") + said(
        completion_tokens=24, status="out of memory"
    )
    rows = launched(monkeypatch, program, "--completion-tokens", "16", "24", "40")
    assert [(row["completion_tokens"], row["status"]) for row in rows] == [
        (16, "ok"),
        (24, "out of memory"),
        (40, "not run: out of memory before"),
    ]


def test_a_row_that_several_ranks_say_is_there_once(monkeypatch):
    program = said(completion_tokens=16, status="out of memory") * 2
    rows = launched(monkeypatch, program)
    assert [row["completion_tokens"] for row in rows] == LENGTHS


def test_a_launch_that_fails_says_with_what(tmp_path, monkeypatch):
    log = tmp_path / "log.txt"
    program = said(completion_tokens=16, status="ok") + "raise RuntimeError('no such link')"
    rows = launched(monkeypatch, program, "--log", str(log))
    assert rows[1]["status"] == "failed with 1: RuntimeError: no such link"
    assert "Launch(engine='single'" in log.read_text() and "Traceback" in log.read_text()


def test_a_launch_ends_when_time_is_over_and_the_next_does_not_start(monkeypatch):
    rows = launched(monkeypatch, "import time; time.sleep(60)", "--seconds", "0.2")
    assert {row["status"] for row in rows} == {"stopped: 0.2 s were over"}
    rows = launched(monkeypatch, "", "--seconds", "0")
    assert {row["status"] for row in rows} == {"not run: 0 s were over"}


@pytest.mark.parametrize(("teacher", "is_refused"), [("offload", True), ("nf4", False)])
def test_the_first_loss_must_be_that_of_the_first_row_of_the_same_precision(teacher, is_refused):
    names = {"completion_tokens": 16, "batch_size": 4, "status": "ok"}
    first = LAUNCH._asdict() | names | {"first_loss": "0.50000"}
    row = first | {"teacher": teacher, "first_loss": "0.51000"}
    found = engines.checked(row, [first])
    assert found["status"].startswith("refused: first loss 0.51, that of single is 0.5") == (
        is_refused
    )
    assert ("first_loss" in found) == (not is_refused)
    assert engines.checked(row | {"completion_tokens": 24}, [first])["status"] == "ok"


def test_every_engine_starts_with_its_own_file():
    options = options_of("--num-gpus", "3")
    for engine in bench.ENGINES[1:]:
        command = engines.command_of(LAUNCH._replace(engine=engine), options, Path())
        (config,) = (Path(part) for part in command if part.endswith(".yaml"))
        assert config.stem == engine and config.is_file()
        assert command[command.index("--num_processes") + 1] == "3"


def test_rows_are_added_to_those_that_are_there(tmp_path):
    path = tmp_path / "rows.csv"
    for value in (1, 2):
        RowLog(path, ["a"], appends=True).add({"a": value})
    assert path.read_text().split() == ["a", "1", "2"]


def test_engines_have_a_record_of_their_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench.parse_options(["--teacher", "nf4"]).output == RESULTS / "train_step_engines.csv"

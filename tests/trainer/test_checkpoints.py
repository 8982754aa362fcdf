"""Checkpoints are complete or do not count; a run goes on from the newest complete one, of its own
student, in a folder of its own.
"""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch

from gold_trainer.objectives import same_vocabulary
from gold_trainer.survival import checkpoints, run_lock
from gold_trainer.survival.nonfinite import NonFiniteError
from gold_trainer.survival.resuming import check_same_student, find_checkpoint
from support.resumed_runs import FIELDS, assert_same_run
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import make_trainer

ROWS = tiny_rows(11, images="mixed")
SAVING = FIELDS | {"save_strategy": "steps", "save_steps": 1, "lmbda": 0.5}


def run(output_dir, *, resume=None, **options):
    trainer = make_trainer(output_dir, ROWS, **(SAVING | options))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run and its folder, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder), folder


@pytest.fixture
def stopped(whole, tmp_path):
    """The folder as it was after three steps."""
    for step in (1, 2, 3):
        shutil.copytree(whole[1] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def cut(path, share=0.5):
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * share))


DAMAGES = {
    "unmarked, without a state": lambda c: [
        (c / n).unlink() for n in ("complete.json", "trainer_state.json")
    ],
    "optimizer.pt": lambda c: (c / "optimizer.pt").unlink(),
    "scheduler.pt": lambda c: (c / "scheduler.pt").unlink(),
    "rng_state.pth": lambda c: (c / "rng_state.pth").unlink(),
    "model.safetensors": lambda c: cut(c / "model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("is_marked", [True, False])
def test_newest_complete_checkpoint_is_taken_and_the_other_named(
    damage, is_marked, stopped, whole, caplog
):
    """With its mark, and as other trainers write checkpoints, without one."""
    newest = stopped / "checkpoint-3"
    DAMAGES[damage](newest)
    if not is_marked:
        (newest / "complete.json").unlink(missing_ok=True)
    with caplog.at_level(logging.WARNING):
        resumed = run(stopped, resume=True)
    assert f"{newest} is incomplete (" in caplog.text
    assert f"going on from {stopped / 'checkpoint-2'}" in caplog.text
    assert_same_run(resumed, whole[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.pt", "optimizer.pt"),
        ("scheduler.pt", "scheduler.pt"),
        ("trainer_state.json", "trainer_state.json"),
        ("model.safetensors", "model.safetensors"),
    ],
)
@pytest.mark.parametrize("is_marked", [True, False])
@pytest.mark.parametrize("is_cut", [True, False])
def test_damaged_checkpoint_given_by_its_folder_is_refused_with_file_and_remedy(
    name, message, is_marked, is_cut, stopped
):
    folder = stopped / "checkpoint-2"
    if not is_marked:
        (folder / "complete.json").unlink()
    if is_cut:
        cut(folder / name)
    else:
        (folder / name).unlink()
    trainer = make_trainer(stopped, ROWS, **SAVING)
    with pytest.raises(ValueError, match=f"{message}.*resume from .*checkpoint-3, which is"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_edited_model_card_is_no_damage(stopped):
    (stopped / "checkpoint-3" / "README.md").write_text("mine")
    assert checkpoints.what_is_wrong(stopped / "checkpoint-3") is None


@pytest.mark.parametrize("resume", [True, "true"])
def test_nothing_to_resume_from_is_refused_and_auto_starts(resume, tmp_path):
    trainer = make_trainer(tmp_path, ROWS, **(SAVING | {"max_steps": 1}))
    with pytest.raises(ValueError, match=r"needs a complete checkpoint.*'auto'"):
        trainer.train(resume_from_checkpoint=resume)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 1


def test_where_no_checkpoint_is_complete_that_is_said_with_what_is_there(tmp_path, caplog):
    student = tiny("qwen3")[0]
    student.save_pretrained(tmp_path / "checkpoint-3")
    assert find_checkpoint("auto", str(tmp_path), student) is None
    assert "from the beginning: " in caplog.text and "checkpoint-3 is incomplete (" in caplog.text
    with pytest.raises(ValueError, match=r"got .*checkpoint-3 is incomplete \(.*'auto'"):
        find_checkpoint(True, str(tmp_path), student)
    with pytest.raises(ValueError, match=f"resume from {tmp_path}/checkpoint-STEP, or bring the"):
        find_checkpoint(str(tmp_path / "checkpoint-3"), str(tmp_path), student)


def test_a_checkpoint_is_compared_with_the_student_as_far_as_its_files_say_what_it_is(tmp_path):
    student, (teacher, _) = tiny("qwen3")[0], tiny("qwen3", "teacher")
    teacher.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="with hidden_size 128 where the student has 64; choose"):
        check_same_student(tmp_path, student)
    check_same_student(tmp_path, teacher)
    config = tmp_path / "config.json"
    known = json.loads(config.read_text())
    del known["architectures"]
    config.write_text(json.dumps(known))
    check_same_student(tmp_path, teacher)
    config.write_text(config.read_text().replace('"qwen3"', '"needs code of its own"'))
    check_same_student(tmp_path, student)
    config.unlink()
    check_same_student(tmp_path, student)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="with adapter present where the student has absent"):
        check_same_student(tmp_path, student)


def test_save_that_fails_leaves_the_checkpoints_of_before(tmp_path, monkeypatch):
    """As on a full disk: nothing of the checkpoint stays, and the older one is not deleted."""
    save, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(None)
        if str(args[1]).endswith("optimizer.pt") and "checkpoint-2" in str(args[1]):
            raise OSError(28, "No space left on device")
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, save_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert checkpoints.what_is_wrong(tmp_path / "checkpoint-1") is None


def test_nonfinite_step_leaves_a_checkpoint_of_the_step_before(tmp_path, monkeypatch, whole):
    """Bit for bit the one that an uninterrupted run saves there."""
    fused, calls = same_vocabulary.fused_linear_loss, []

    def spoiled(*args, **options):
        loss, values = fused(*args, **options)
        calls.append(None)
        return (loss * float("nan") if len(calls) == 6 else loss), values

    with monkeypatch.context() as patch:
        patch.setattr(same_vocabulary, "fused_linear_loss", spoiled)
        with pytest.raises(NonFiniteError, match="step 3 "):
            run(tmp_path, save_steps=100)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert_same_run(run(tmp_path, resume=True, save_steps=100), whole[0])


def test_checkpoints_of_another_student_are_refused_by_name(stopped):
    for family in ("lfm2_vl", "qwen2_5_vl"):
        other = make_trainer(stopped, ROWS, family, **SAVING)
        for resume in (True, None):
            with pytest.raises(ValueError, match=r"checkpoint-\d with model_type qwen3_vl"):
                other.train(resume_from_checkpoint=resume)


def test_adapter_does_not_go_on_from_whole_weights(stopped):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(stopped, ROWS, peft_config=config, **SAVING)
    with pytest.raises(ValueError, match="adapter absent where the student has present"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("resume", [None, False, "false"])
def test_new_run_among_checkpoints_of_an_earlier_one_is_refused_with_the_ways_on(resume, stopped):
    trainer = make_trainer(stopped, ROWS, **SAVING)
    message = "with checkpoint-3; resume_from_checkpoint=True .* overwrite_output_dir=True deletes"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=resume)
    assert len(checkpoints.checkpoints_in(stopped)) == 3
    assert not (stopped / run_lock.NAME).exists()


def test_new_run_deletes_the_checkpoints_of_an_earlier_one_where_it_is_told_to(stopped, caplog):
    (stopped / "notes.txt").write_text("mine")
    run(stopped, overwrite_output_dir=True, max_steps=1)
    assert [path.name for path in checkpoints.checkpoints_in(stopped)] == ["checkpoint-1"]
    assert f"deleting {stopped / 'checkpoint-3'}" in caplog.text
    assert (stopped / "notes.txt").exists()


def test_resumed_run_deletes_nothing(stopped, whole):
    assert_same_run(run(stopped, resume=True, overwrite_output_dir=True), whole[0])
    assert (stopped / "checkpoint-1").is_dir()


def test_new_run_that_saves_no_checkpoint_says_whose_are_there(stopped, caplog):
    run(stopped, max_steps=1, save_strategy="no")
    assert "no checkpoints of an earlier run" in caplog.text and "checkpoint-3" in caplog.text


def test_trainer_that_trains_on_is_not_refused_its_own_checkpoints(tmp_path):
    trainer = run(tmp_path, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_second_run_in_a_folder_is_refused_with_the_first_ones_process(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        owner = {
            "pid": first.pid,
            "host": run_lock._identity()["host"],
            "start": run_lock._start_of(first.pid),
            "since": "2026-01-01 00:00:00",
        }
        (tmp_path / run_lock.NAME).write_text(json.dumps(owner))
        trainer = make_trainer(tmp_path, ROWS, **SAVING)
        with pytest.raises(ValueError, match=rf"process {first.pid} on .* since 2026-01-01"):
            trainer.train()
    finally:
        first.communicate(b"\n")
    assert (tmp_path / run_lock.NAME).exists(), "the other's lock is not this run's to delete"
    trainer.train()
    assert not (tmp_path / run_lock.NAME).exists()


@pytest.mark.parametrize(
    "owner",
    [
        "",
        "{",
        "[]",
        {"pid": 2**22 + 1, "host": "here", "start": "x"},
        {"pid": os.getpid(), "host": "here", "start": "another boot"},
        {"pid": 1, "host": "here", "start": "another boot"},
    ],
)
def test_lock_of_a_process_that_is_gone_is_taken_over_and_said_so(owner, tmp_path, caplog):
    if isinstance(owner, dict):
        owner = json.dumps(owner | {"host": run_lock._identity()["host"]})
    (tmp_path / run_lock.NAME).write_text(owner)
    lock = run_lock.RunLock(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        lock.acquire()
    assert "is gone" in caplog.text
    lock.release()
    assert not (tmp_path / run_lock.NAME).exists()


def test_lock_of_another_trainer_of_the_process_is_left_to_it(tmp_path):
    lock, other = run_lock.RunLock(str(tmp_path)), run_lock.RunLock(str(tmp_path))
    lock.acquire()
    with pytest.raises(ValueError, match=f"process {os.getpid()} on .* has written to since"):
        other.acquire()
    other.release()
    with pytest.raises(ValueError, match="must belong to one run at a time"):
        other.acquire()
    lock.release()
    other.acquire()


def test_lock_of_another_host_is_respected(tmp_path):
    (tmp_path / run_lock.NAME).write_text(json.dumps({"pid": 5, "host": "far", "since": "then"}))
    with pytest.raises(ValueError, match=r"process 5 on far has written to since then.*delete"):
        run_lock.RunLock(str(tmp_path)).acquire()


def test_full_disk_at_the_start_is_said_with_the_folder_and_leaves_no_lock(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(ValueError, match=rf"got {tmp_path} \(No space left on device\); free some"):
        run_lock.RunLock(str(tmp_path)).acquire()
    assert not list(tmp_path.iterdir())

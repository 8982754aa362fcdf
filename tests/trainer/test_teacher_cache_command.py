"""gold-trainer cache-teacher: what it refuses before the teacher runs, and how it goes on."""

import multiprocessing
import os
import re
import signal

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gold_trainer.__main__ import main
from gold_trainer.caching import store
from gold_trainer.caching.store import ShardWriter
from support.cache_cases import run_of


def user_error(capsys, *argv):
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher_cache="], "teacher_cache must be the folder of a cache, got ''"),
        (
            ["--cache_dtype=int8"],
            "cache_dtype must be one of auto, bfloat16, float16, float32, got",
        ),
        (["--teacher_sharding=fsdp"], "teacher_sharding must be None with teacher_cache, got 'fs"),
        (["--cache_shard_mib=0"], "cache_shard_mib must be a number above 0, got '0'"),
        (["--cache_batch_size=1.5"], "cache_batch_size must be a whole number, at least 1, got"),
        (
            ["--dataset_streaming=true"],
            "a dataset must have a length with teacher_cache, got a str",
        ),
        (["--max_length=100"], "was made with max_length 256, this run has 100"),
        (["--cache_dtype=bfloat16"], "was made with cache_dtype float32, this run has bfloat16"),
    ],
)
def test_the_command_refuses_what_it_cannot_cache(made, capsys, flags, message):
    cache = made.folder / "cache"
    argv = made.command("--cache_dtype=float32", *flags, teacher_cache=cache)
    assert message in user_error(capsys, "cache-teacher", *argv)


def test_the_command_asks_for_its_folder_and_for_a_teacher(made, capsys):
    told = user_error(capsys, "cache-teacher", *made.command())
    assert "teacher_cache must be the folder to write to, got None; set it in the YAML" in told
    cache = made.folder / "cache"
    argv = made.command(teacher_cache=cache, teacher_model_name_or_path=None)
    told = user_error(capsys, "cache-teacher", *argv)
    assert "teacher_model_name_or_path must be the teacher to run, got None" in told


def test_room_on_the_disk_and_another_folder_are_looked_at_before_the_teacher_runs(
    made, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("gold_trainer.caching.run.make_live_teacher", None)  # would raise
    argv = ["cache-teacher", *made.command(teacher_cache=tmp_path / "a" / "cache")]
    monkeypatch.setattr(store, "free_bytes", lambda folder: 10_000)
    told = user_error(capsys, *argv)
    assert re.search(r"must have \d+\.\d KiB free, got 9.8 KiB; free some, choose another", told)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("")
    argv = ["cache-teacher", *made.command(teacher_cache=tmp_path / "b")]
    assert "must be a new folder, or that of an earlier run of this command, got" in user_error(
        capsys, *argv
    )
    argv = ["cache-teacher", *made.command(teacher_cache=tmp_path / "b" / "thesis.tex")]
    told = user_error(capsys, *argv)
    assert "teacher_cache must be a folder that can be written, got" in told
    assert "thesis.tex (Not a directory)" in told


def test_hidden_states_that_are_not_finite_are_refused_by_their_row(pair, capsys):
    weights = load_file(pair.weights)
    weights["model.norm.weight"].fill_(1e6)  # too much for float16
    save_file(weights, pair.weights, {"format": "pt"})
    argv = pair.command("--cache_dtype=float16", teacher_cache=pair.folder / "other")
    told = user_error(capsys, "cache-teacher", *argv)
    assert re.search(
        r"error: row \d: the teacher's hidden states must be finite, got NaN or i", told
    )


def test_a_disk_that_is_full_after_all_keeps_what_is_there(made, capsys, tmp_path, monkeypatch):
    save = store.save_file

    def full(tensors, path):
        if "00001" in path.name:
            raise SafetensorError("No space left on device (os error 28)")
        save(tensors, path)

    monkeypatch.setattr(store, "save_file", full)
    argv = made.command("--cache_shard_mib=0.001", teacher_cache=tmp_path / "cache")
    told = user_error(capsys, "cache-teacher", *argv)
    assert "rows-000-00001.safetensors cannot be written (No space left on device" in told
    assert "start again: what is there is kept" in told
    assert [path.name for path in (tmp_path / "cache").glob("rows-*.arrow")] == [
        "rows-000-00000.arrow"
    ]
    monkeypatch.undo()
    assert main(["cache-teacher", *argv]) == 0


def kill_at(flush, number, stage):
    """A flush that ends the process before, within, or behind the shard of this number."""

    def killed(writer):
        if writer.number == number and writer.entries:
            if stage == "half":  # rows without an index
                table = store._write_table
                store._write_table = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
                flush(writer)
                store._write_table = table
            os.kill(os.getpid(), signal.SIGKILL)
        flush(writer)

    return killed


@pytest.mark.parametrize("stage", ["half", "before"])
def test_a_caching_run_that_is_killed_goes_on_where_it_was(made, stage, tmp_path, monkeypatch):
    pair = made._replace(folder=tmp_path)
    for name in ("student", "teacher", "rows.jsonl"):
        (tmp_path / name).symlink_to(made.folder / name)
    flush = ShardWriter.flush
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "flush", kill_at(flush, 2, stage))
        process = multiprocessing.get_context("fork").Process(
            target=pair.cache, args=("cache", "--cache_shard_mib=0.001")
        )
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    cache = tmp_path / "cache"
    before = {p.name: p.stat().st_mtime_ns for p in cache.glob("rows-*.arrow")}
    assert len(before) == 2
    with pytest.raises(ValueError, match="is half written"):
        run_of(pair, tmp_path / "run", teacher_cache=str(cache))
    rows_of_teacher = []
    add = ShardWriter.add
    monkeypatch.setattr(
        ShardWriter,
        "add",
        lambda self, place, *rest: (rows_of_teacher.append(place.row), add(self, place, *rest)),
    )
    pair.cache("cache", "--cache_shard_mib=0.001")
    after = {p.name: p.stat().st_mtime_ns for p in cache.glob("rows-*.arrow")}
    assert after.items() > before.items()
    assert 0 < len(rows_of_teacher) < len(made.rows)
    assert not list(cache.glob("*.half"))
    live = run_of(pair, tmp_path / "live", max_steps=3)
    cached = run_of(pair, tmp_path / "run", max_steps=3, teacher_cache=str(cache))
    assert cached[0] == pytest.approx(live[0], rel=1e-5)

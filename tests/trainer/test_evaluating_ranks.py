"""Two gloo processes evaluate as one does: no row counts twice where rows do not fill a batch."""

import pytest

from gold_trainer.data.filled import FilledRows, FilledSampler, FilledStream, WithoutFill
from support.processes import run_step


def test_two_processes_evaluate_each_row_once(tmp_path):
    """One row leaves a rank without any; three and five fill no last batch. An empty prompt is
    skipped, and counted once.
    """
    one = run_step("evaluating_step", tmp_path / "one", 1, 2)
    two = run_step("evaluating_step", tmp_path / "two", 2, 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert {form for form, _ in one["found"]} == {"rows", "table", "stream", "predict"}
    for case, expected in one["found"].items():
        found = two["found"][case]
        assert found == pytest.approx(expected, rel=1e-5), case
        same_rows = one["found"]["rows", case[1]]
        for name in ("eval_loss", "eval_completion_length", "eval_skipped_rows"):
            assert expected[name] == pytest.approx(same_rows[name], rel=1e-5), (case, name)
    assert one["found"]["rows", 3]["eval_skipped_rows"] == 1
    assert one["found"]["rows", 5]["eval_loss"] != one["found"]["rows", 3]["eval_loss"]


@pytest.mark.parametrize(("count", "multiple"), [(1, 4), (4, 4), (5, 4), (0, 2)])
def test_what_fills_a_batch_is_no_row(count, multiple):
    rows = [str(i) for i in range(count)]
    sampler = FilledSampler(range(count), multiple)
    read = [FilledRows(rows)[index] for index in sampler]
    assert len(read) == len(sampler) == -(-count // multiple) * multiple
    assert read[:count] == rows and set(read[count:]) <= {None}
    assert len(FilledRows(rows)) == count
    collate = WithoutFill(list, lambda index: f"blank {index}")
    assert collate(read[:multiple]) == rows[:multiple] or not count
    assert collate([None, None]) == "blank 0"


def test_a_stream_is_filled_at_its_end():
    assert list(FilledStream(["a", "b", "c"], 2)) == ["a", "b", "c", None]
    assert list(FilledStream(["a", "b"], 2)) == ["a", "b"]

"""An error that one of two processes meets ends both, and names the last checkpoint."""

import pytest

from gold_trainer.survival import checkpoints
from support.processes import start_ranks


@pytest.mark.parametrize(
    ("place", "kind", "message"),
    [
        ("loss", "RuntimeError", "out of memory"),
        ("row", "ValueError", "row 11: "),
    ],
)
def test_error_on_one_rank_ends_all_and_names_the_last_checkpoint(place, kind, message, tmp_path):
    done = start_ranks("failing_step", 2, str(tmp_path), place)
    assert done.returncode != 0
    newest = tmp_path / "checkpoint-1"
    assert f"{kind} in step 2, rank 1; {newest} is complete, resume_from" in done.stderr
    assert message in done.stderr and "Timeout (" not in done.stderr
    assert checkpoints.find_newest(tmp_path, num_ranks=2) == (newest, {})

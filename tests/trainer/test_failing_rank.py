"""An error that one of two processes meets ends both, and names the last checkpoint."""

from gold_trainer import checkpoints
from support.processes import start_ranks


def test_error_on_one_rank_ends_all_and_names_the_last_checkpoint(tmp_path):
    done = start_ranks("failing_step", 2, str(tmp_path))
    assert done.returncode != 0
    newest = tmp_path / "checkpoint-1"
    assert f"RuntimeError in step 2, rank 1; {newest} is complete, resume_from" in done.stderr
    assert "out of memory" in done.stderr
    assert checkpoints.find_newest(tmp_path, num_ranks=2) == (newest, {})

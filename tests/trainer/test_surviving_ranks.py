"""Two processes: NaN, a signal or a lock that one of them meets ends the run of both alike."""

import pytest
import torch

from support.processes import run_step


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "run"
    run_step("surviving_step", folder, 2, 2, 1)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]


def test_nan_on_one_rank_stops_both_with_the_rows_of_that_rank(ranks):
    for rank in ranks:
        assert rank["error"]["step"] == 1
        assert "NonFiniteError" in rank["error"]["how"]
        assert (
            "step 2 must have finite values, got NaN or inf in the student's loss"
            in (rank["error"]["how"])
        )
        assert "dataset rows 6, 7;" in rank["error"]["how"]
    assert ranks[0]["error"]["weights"] == ranks[1]["error"]["weights"]


def test_nan_on_one_rank_is_left_out_by_both(ranks):
    for rank in ranks:
        assert (rank["skip"]["how"], rank["skip"]["step"]) == ("done", 3)
    assert ranks[0]["skip"]["weights"] == ranks[1]["skip"]["weights"]
    assert ranks[0]["skip"]["weights"] != ranks[0]["whole"]["weights"]


def test_signal_to_one_rank_ends_both_after_the_same_step_and_both_go_on(ranks):
    for rank in ranks:
        assert rank["signal"]["how"] == "SystemExit: 143"
        assert rank["signal"]["newest"] == f"checkpoint-{rank['signal']['step']}"
        assert rank["resumed"]["how"] == "done"
        assert rank["resumed"]["weights"] == rank["whole"]["weights"]
    assert ranks[0]["signal"]["step"] == ranks[1]["signal"]["step"] < 3


def test_the_main_process_may_save_whole_weights_alone(ranks):
    assert ranks[0]["whole"]["saved"]


def test_stream_is_shared_out_as_rows_in_order_are(ranks):
    for rank in ranks:
        assert rank["stream"]["how"] == "done"
        assert rank["stream"]["weights"] == rank["whole"]["weights"]


def test_lock_stops_every_rank(ranks):
    for rank in ranks:
        assert "process 5 on far" in rank["locked"]["how"]

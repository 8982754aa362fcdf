"""Counts of rows that were left out: of each evaluation, and since a run began."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from gold_trainer import GOLDConfig
from gold_trainer.batches import WindowBatch
from gold_trainer.data.bad_rows import NAME, SkippedRows
from gold_trainer.data.row_errors import BadRow
from support.trainer_cases import FIELDS

ONE_PROCESS = SimpleNamespace(device="cpu", reduce=lambda counts, reduction: counts)


@pytest.fixture
def args(tmp_path):
    return GOLDConfig(output_dir=str(tmp_path), on_bad_row="skip", **FIELDS)


def batch(*reasons):
    skipped = [BadRow(i, reason, f"row {i}: it is {reason}") for i, reason in enumerate(reasons)]
    return WindowBatch([], [], skipped=skipped)


def trained(args, kept=None, *, num_items=0, reasons=("picture",)):
    """What a run of two steps has counted, perhaps behind a resume; its end may raise."""
    skipped, state = SkippedRows(args), TrainerState(global_step=0)
    if kept is not None:
        state.global_step, state.stateful_callbacks = 5, {NAME: kept}
    skipped.on_train_begin(args, state, TrainerControl())
    for own in (num_items, 0):
        counts = skipped.count([batch(*reasons)])
        skipped.add(torch.tensor([own, 0, *counts]))
        skipped.on_step_end(args, state, TrainerControl())
        state.global_step += 1
    skipped.on_train_end(args, state, TrainerControl())
    skipped.keep(state)
    return skipped.logs(), state.stateful_callbacks[NAME]


def test_each_evaluation_counts_its_own_rows(args):
    skipped = SkippedRows(args)
    for _ in range(2):
        skipped.start_evaluation()
        for _ in range(2):
            skipped.count_evaluated(batch("picture", "template"))
        logs = skipped.evaluation_logs(ONE_PROCESS)
        assert logs == {NAME: 4, f"{NAME}/picture": 2, f"{NAME}/template": 2}


def test_a_resumed_run_goes_on_counting_and_knows_that_it_has_learnt(args):
    """The rest of an epoch may have nothing but bad rows."""
    logs, kept = trained(args, num_items=7)
    assert logs == {NAME: 2, f"{NAME}/picture": 2} and kept["has_learnt"]
    logs, kept = trained(args, kept, reasons=("picture", "template"))
    assert logs == {NAME: 6, f"{NAME}/picture": 4, f"{NAME}/template": 2} and kept["has_learnt"]


def test_a_run_that_has_learnt_from_nothing_says_so_behind_a_resume_too(args):
    kept = {"counts": {"picture": 2, "unknown": 9}, "has_learnt": False}
    message = "at least one row must be usable, got none: 4 picture were left out"
    with pytest.raises(ValueError, match=message):
        trained(args, kept)

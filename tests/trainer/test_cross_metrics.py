"""What is logged across families: every metric equals that of the oracle on full logits, over the
rows of a batch, of a window of several steps, and of an evaluation.
"""

import math
from itertools import combinations

import pytest

from support.cross_cases import cross_trainer, make_sides
from support.metric_cases import FIELDS, MEANS, loss_of, metrics_of, row_sums, rows_with_skips

PAIR = ("llama", "qwen3")


def assert_log(entry: dict[str, float], expected: dict[str, float], prefix: str = "") -> None:
    actual = {name: entry[prefix + name] for name in expected}
    assert actual == pytest.approx(expected, rel=2e-5)


def test_metrics_of_a_batch_are_those_of_the_oracle(tmp_path):
    sides = make_sides(*PAIR)
    given = rows_with_skips(*sides, count=7, unspelled=(0, 3), cut=5)
    sums = row_sums(*sides, given)
    expected = metrics_of(sums)
    for first, second in combinations(MEANS, 2):
        gap = abs(expected[first] - expected[second])
        assert gap > 1e-3 * expected[first], f"{first} and {second} could be exchanged"
    assert (expected["skipped_unspelled"], expected["skipped_no_common_end"]) == (2, 1)
    trainer, _ = cross_trainer(
        tmp_path,
        given.rows,
        *sides,
        eval_rows=given.rows,
        per_device_eval_batch_size=3,
        max_length=given.max_length,
        max_steps=1,
        **FIELDS,
    )
    loss = loss_of(sums)
    assert_log(trainer.evaluate(), expected, "eval_")
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert_log(entry, expected | {"loss": loss, "off_policy_loss": loss})


def test_a_window_of_several_steps_is_a_mean_over_what_each_metric_counts(tmp_path):
    """Two steps a log, two micro-batches a step; of the third step nothing is distilled."""
    sides = make_sides(*PAIR)
    given = rows_with_skips(*sides, count=8, unspelled=(1, 4, 5), cut=6)
    sums = row_sums(*sides, given)
    trainer, _ = cross_trainer(
        tmp_path,
        given.rows,
        *sides,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_length=given.max_length,
        max_steps=4,
        logging_steps=2,
        learning_rate=0.0,
        **FIELDS,
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry, first in zip(entries, (0, 4), strict=True):
        steps = sums[first : first + 2], sums[first + 2 : first + 4]
        groups = [sum(row["groups"] for row in step) for step in steps]
        assert groups[0] != groups[1], "a mean of means would be the same"
        # the Trainer's loss is a mean over steps
        losses = {"loss": sum(map(loss_of, steps)) / 2}
        window = sums[first : first + 4]
        assert loss_of(window) != pytest.approx(losses["loss"], rel=1e-4)
        losses["off_policy_loss"] = loss_of(window)
        assert_log(entry, metrics_of(window) | losses)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_an_evaluation_in_which_nothing_is_distilled_has_no_mean_of_it(weight, tmp_path):
    """0 would be the best loss of all checkpoints. The cross-entropy of the tokens remains."""
    sides = make_sides(*PAIR)
    given = rows_with_skips(*sides, count=3, unspelled=(0, 2), cut=1)
    fields = FIELDS | {"uld_crossentropy_weight": weight}
    trainer, _ = cross_trainer(
        tmp_path, given.rows, *sides, max_length=given.max_length, max_steps=1, **fields
    )
    metrics = trainer.evaluate([given.rows[i] for i in given.unspelled])
    assert metrics["eval_skipped_unspelled"] == 2 and metrics["eval_groups_per_token"] == 0
    assert math.isnan(metrics["eval_uld_loss"]) and math.isnan(metrics["eval_matched_loss"])
    if weight:
        assert metrics["eval_loss"] == pytest.approx(weight * metrics["eval_crossentropy"])
    else:
        assert math.isnan(metrics["eval_loss"])

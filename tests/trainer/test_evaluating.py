"""Rows that are evaluated: all of them, read anew, and those that there are not refused."""

import pytest

from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer

ROWS = tiny_rows(5)


def make(folder, rows=None, **fields):
    return make_trainer(folder, ROWS, "qwen3", eval_rows=rows, **fields)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"evaluate takes a dataset, or a dict of at least one by name, got \{\}"),
        ({"a": ROWS, "b": None}, "got {'a': 'list', 'b': 'NoneType'}; pass the rows, or nothing"),
        ("b", r"the name of an eval_dataset, got 'b' and one of \['a'\]; pass the rows"),
    ],
)
def test_rows_to_evaluate_that_there_are_not_are_refused(given, message, tmp_path):
    trainer = make(tmp_path, {"a": ROWS})
    assert "eval_loss" in trainer.evaluate("a")
    with pytest.raises(ValueError, match=f"^GOLDTrainer: .*{message}"):
        trainer.evaluate(given)


def test_predictions_are_of_one_dataset(tmp_path):
    trainer = make(tmp_path)
    with pytest.raises(ValueError, match=r"predict takes one dataset, got a dict of \['a'\]"):
        trainer.predict({"a": ROWS})
    with pytest.raises(ValueError, match="got 'a' and no dict of them"):
        trainer.evaluate("a")


def test_workers_that_stay_do_not_keep_rows_that_were_evaluated_once(tmp_path):
    """transformers keeps one data loader under the name of all datasets that come without one."""
    fields = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    other = [{"prompt": "What?", "completion": "Quite another answer, of more tokens."}]
    expected = {
        name: make(tmp_path).evaluate(rows)["eval_loss"]
        for name, rows in (("own", ROWS), ("other", other))
    }
    trainer = make(tmp_path, ROWS, **fields)
    for name, rows in (("own", None), ("other", other), ("own", None)):
        loss = trainer.evaluate(rows)["eval_loss"]
        assert loss == pytest.approx(expected[name], rel=1e-6), name
    losses = trainer.evaluate({"own": ROWS, "other": other})
    assert losses["eval_other_loss"] == pytest.approx(expected["other"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_rows_that_fill_no_batch_are_evaluated_too(batch_size, tmp_path):
    """dataloader_drop_last left them out, and gave NaN where no batch was left."""
    fields = {"per_device_eval_batch_size": batch_size}
    expected = make(tmp_path, ROWS).evaluate()["eval_loss"]
    trainer = make(tmp_path, ROWS, dataloader_drop_last=True, **fields)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.predict(ROWS).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.args.dataloader_drop_last and len(trainer.get_train_dataloader()) == 1


def test_the_best_model_of_several_datasets_is_that_of_one_of_them(tmp_path):
    fields = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    fields |= {"load_best_model_at_end": True}
    with pytest.raises(ValueError, match=r"metric_for_best_model must be one of a_loss, .*'loss'"):
        make(tmp_path, {"a": ROWS, "b": ROWS}, **fields)
    make(tmp_path, {"a": ROWS}, metric_for_best_model="a_loss", **fields).train()

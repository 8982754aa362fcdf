"""Arguments of the constructor, as users of other trainers bring them: used or refused at once."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, TrainerCallback, default_data_collator

from gold_trainer import GOLDConfig, GOLDTrainer, arguments
from gold_trainer.rendering.collator import GOLDCollator
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import FIELDS, losses_of, make_trainer

ROWS = tiny_rows(4)
ELSEWHERE = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1e-2)
SCHEDULE = torch.optim.lr_scheduler.LambdaLR(ELSEWHERE, lambda step: 1.0)


class Silent(TrainerCallback):
    pass


def make(tmp_path, fields=None, **given):
    return GOLDTrainer(
        **{
            "model": tiny("qwen3")[0],
            "teacher_model": tiny("qwen3", "teacher")[0],
            "args": GOLDConfig(output_dir=str(tmp_path / "run"), **(FIELDS | (fields or {}))),
            "train_dataset": ROWS,
            "processing_class": tiny("qwen3")[1],
            **given,
        }
    )


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("tokenizer", "pass processing_class="),
        ("model_init", "pass model=, and make a trainer for each trial"),
        ("compute_loss_func", "set loss in GOLDConfig, docs/add_a_loss.md adds one"),
        ("optimizer_cls_and_kwargs", "set optim and optim_args in GOLDConfig"),
        ("formatting_func", "write rows with messages, or prompt and completion"),
        ("reward_funcs", "there are no rewards here"),
        ("trian_dataset", r"did you mean train_dataset\?"),
        ("xyzzy_q", "they are model, teacher_model, args"),
    ],
)
def test_an_argument_that_there_is_not_has_a_remedy(name, remedy):
    with pytest.raises(ValueError, match=f"^GOLDTrainer: there is no argument '{name}'; {remedy}"):
        GOLDTrainer(model="student", **{name: 1})


def test_arguments_without_a_name_are_refused():
    with pytest.raises(ValueError, match=r"must be given by name, got 2 without one; write model="):
        GOLDTrainer("student", "teacher")


def test_a_class_that_is_derived_may_take_more(tmp_path):
    class Mine(GOLDTrainer):
        def __init__(self, size, **given):
            self.size = size
            super().__init__(**given)

    args = GOLDConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="a teacher is expected"):
        Mine(3, model="student", args=args)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"callbacks": Silent()}, "callbacks must be a list of TrainerCallbacks, got Silent; writ"),
        ({"callbacks": (Silent(),)}, "callbacks must be a list .* got tuple"),
        ({"callbacks": "wandb"}, "callbacks must be a list .* got str"),
        ({"callbacks": [print]}, "got builtin_function_or_method in it"),
        ({"optimizers": ELSEWHERE}, "optimizers must be a pair .* got SGD; write optimizers="),
        ({"optimizers": None}, "optimizers must be a pair .* got NoneType"),
        ({"optimizers": (torch.optim.SGD, None)}, r"must be a pair .* got \(SGD, NoneType\)"),
        ({"optimizers": (SCHEDULE, ELSEWHERE)}, r"must be a pair .* got \(LambdaLR, SGD\)"),
        ({"optimizers": (None, SCHEDULE)}, "schedule in optimizers must be of the optimizer besi"),
        ({"optimizers": (ELSEWHERE, None), "model": "a"}, r"must be \(None, None\) for a student"),
        (
            {"optimizers": (ELSEWHERE, None)},
            "must hold parameters that the student trains, got SGD",
        ),
        ({"model": Path("student")}, r"model must be a model, .* got PosixPath; pass str\(it\)"),
        (
            {"teacher_model": GOLDTrainer},
            "teacher_model must be a model, .* got GOLDTrainer; pass ",
        ),
        ({"data_collator": "pad"}, "data_collator must make WindowBatches of Rows, got str"),
        ({"data_collator": default_data_collator}, "RuntimeError of default_data_collator"),
        ({"data_collator": list}, "must make a WindowBatch of a list of Rows, got list of list"),
        ({"teacher_processing_class": "a"}, "teacher_processing_class must be a tokenizer or a pr"),
        ({"fields": {"loss_backend": "triton"}}, "loss_backend must be None or 'torch' without a"),
        ({"eval_dataset": {}}, "eval_dataset must be a dataset, or a dict of at least one by name"),
        ({"eval_dataset": {"a": None}}, "a dict of at least one by name, got {'a': 'NoneType'}"),
        ({"eval_dataset": []}, "at least one row is expected, got none"),
        ({"fields": {"eval_strategy": "epoch"}}, "must hold rows with eval_strategy, got None"),
        ({"fields": {"eval_on_start": True}}, "must hold rows with eval_on_start, got None"),
    ],
)
def test_an_argument_that_cannot_be_used_is_refused(given, message, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **given)


def test_a_collator_of_another_library_is_refused(tmp_path):
    collate = DataCollatorForSeq2Seq(tiny("qwen3")[1])
    with pytest.raises(ValueError, match="got TypeError of DataCollatorForSeq2Seq"):
        make(tmp_path, data_collator=collate)


def test_a_backend_that_is_interpreted_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "is_interpreted", lambda: True)
    make(tmp_path, {"loss_backend": "triton"})


def test_what_fits_is_used(tmp_path):
    student = deepcopy(tiny("qwen3")[0])
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-2)
    tokenizer = tiny("qwen3")[1]
    trainer = make(
        tmp_path,
        model=student,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        callbacks=[Silent, Silent()],
        data_collator=GOLDCollator(tokenizer, [tokenizer.eos_token_id], 256),
    )
    trainer.train()
    assert len(losses_of(trainer)) == 1
    assert trainer.optimizer.optimizer is optimizer


@pytest.mark.parametrize(
    ("fields", "is_told"),
    [
        ({"eval_steps": 1}, False),
        ({"eval_steps": 2}, True),
        ({"eval_steps": 1, "eval_delay": 2}, True),
        ({"eval_steps": 0.5}, False),
        ({"eval_steps": 2, "eval_on_start": True}, False),
    ],
)
def test_a_run_that_ends_before_its_first_evaluation_is_told(fields, is_told, tmp_path, caplog):
    make(tmp_path, {"eval_strategy": "steps", **fields}, eval_dataset=ROWS)
    assert ("nothing is evaluated with" in caplog.text) == is_told


def test_a_search_of_hyperparameters_is_refused_with_a_remedy(tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows(4), "qwen3")
    with pytest.raises(ValueError, match=r"^GOLDTrainer: .*make a trainer for each, and compare"):
        trainer.hyperparameter_search(n_trials=1)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), torch.nn.DataParallel])
def test_a_model_that_is_wrapped_already_is_refused_with_what_to_pass(side, wrap, tmp_path):
    wrapped = {side: wrap(tiny("qwen3", side)[0])}
    with pytest.raises(ValueError, match=rf"the {side} must be the model itself, got .* is inside"):
        make_trainer(tmp_path, tiny_rows(4), "qwen3", **wrapped)

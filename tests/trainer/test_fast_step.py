"""What is done ahead, on the host, or in another order, gives the same step."""

from dataclasses import replace

import pytest
import torch

from gold_trainer import models, sharding
from gold_trainer.speed import deepstack, on_host
from gold_trainer.speed.grouping import by_length
from gold_trainer.speed.replacing import all_replaced
from gold_trainer.speed.training_mode import TrainingMode
from support.on_device import on_device
from support.tiny_models import tiny, tiny_rows, with_lengths
from support.trainer_cases import (
    GradientRecorder,
    assert_equal_steps,
    losses_of,
    make_trainer,
    record_widths,
)


def rows_of_lengths(lengths):
    return with_lengths(tiny_rows(len(lengths)), lengths)


def gradients(folder, rows, **fields):
    torch.manual_seed(0)
    recorder = GradientRecorder()
    trainer = make_trainer(folder, rows, "qwen3", callbacks=[recorder], **fields)
    widths = record_widths(trainer)
    trainer.train()
    return trainer, recorder, widths


def test_rows_grouped_by_length_have_less_padding_and_the_same_gradient(tmp_path):
    rows = rows_of_lengths([1, 30, 2, 29, 31, 3, 28, 4] * 2)
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    run, recorder, widths = gradients(tmp_path, rows, **fields, group_by_length=True)
    mixed, recorder_2, widths_2 = gradients(tmp_path, rows, **fields)
    assert len(widths) == len(widths_2) == 8, "each micro-batch is made once, also the first"
    assert sum(widths) < 0.75 * sum(widths_2)
    torch.testing.assert_close(losses_of(run), losses_of(mixed), rtol=1e-6, atol=1e-7)
    assert_equal_steps(recorder_2, recorder)


def batches_of(trainer, places):
    return [trainer.data_collator([trainer.train_dataset[i] for i in own]) for own in places]


def indices(batches):
    return [[example.index for example in batch.examples] for batch in batches]


def test_only_rows_that_learn_from_the_dataset_change_places(tmp_path):
    trainer = make_trainer(tmp_path, rows_of_lengths([1, 9, 2, 8, 3, 7]), "qwen3")
    batches = batches_of(trainer, [(0, 1), (2, 3), (4, 5)])
    assert indices(by_length(batches, ["dataset", "student", "dataset"])) == [
        [1, 5],
        [2, 3],
        [4, 0],
    ]
    assert indices(by_length(batches, ["student", "dataset", "student"])) == [
        [0, 1],
        [3, 2],
        [4, 5],
    ]
    assert indices(by_length(batches, ["teacher"] * 3)) == [[0, 1], [2, 3], [4, 5]]


def seen_in(folder, resume=False, **fields):
    """Micro-batches of each step, and the rows that a step asks a writer for."""
    torch.manual_seed(0)
    rows, seen = rows_of_lengths([1 + (7 * i) % 11 for i in range(18)]), []
    fields |= {"group_by_length": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer = make_trainer(folder, rows, "qwen3", max_completion_length=3, **sizes, **fields)
    prepare = trainer.objective.prepare

    def watched(batch, *args):
        seen.append([example.index for example in batch.examples])
        return prepare(batch, *args)

    trainer.objective.prepare = watched
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return seen


@pytest.mark.parametrize("lmbda", [0.5, 1.0])
def test_a_resumed_run_has_the_micro_batches_of_the_whole_run(lmbda, tmp_path):
    whole = seen_in(tmp_path, lmbda=lmbda)  # an epoch has 3 steps
    assert len(whole) == 12
    assert seen_in(tmp_path, resume=True, lmbda=lmbda) == whole[6:]


def test_rows_are_grouped_before_ranks_agree_on_the_pictures_of_a_micro_batch(tmp_path):
    rows = tiny_rows(4, images=1)
    rows[1:3] = tiny_rows(4)[1:3]  # with a picture: the first and the last
    with_lengths(rows, [30, 1, 2, 20])
    fields = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, rows, "qwen3_vl", group_by_length=True, **fields)
    source, agreed = trainer.window_source, []
    pictures = source.pictures_for_all
    vars(pictures)["is_needed"] = True  # as under FSDP

    def add(batches):
        agreed.append(indices(batches))
        own = [sharding.has_media(batch.examples, "images") for batch in batches]
        assert own == [True, False]
        return [
            replace(batch, unscored=[] if has else [pictures.example("student", "images")])
            for batch, has in zip(batches, own, strict=True)
        ]

    pictures.add = add
    window = source.next(iter(batches_of(trainer, [(0, 1), (2, 3)])), 2, trainer.state)
    assert agreed == [indices(window)] == [[[0, 3], [2, 1]]]
    assert all(sharding.has_media(batch.examples + batch.unscored, "images") for batch in window), (
        "the tower runs in every micro-batch, as on the other ranks"
    )


def test_an_error_of_the_next_windows_rows_leaves_this_step_whole(tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows(12), "qwen3", max_steps=3)
    collate, seen = trainer.data_collator, []

    def failing(batch):
        seen.append(trainer.state.global_step)
        if len(seen) == 3:  # accelerate is one batch ahead of who asks
            raise ValueError("row 5 is bad")
        return collate(batch)

    trainer.data_collator = failing
    with pytest.raises(ValueError, match="row 5 is bad"):
        trainer.train()
    assert seen == [0, 0, 0], "the second window is read within the first step"
    assert trainer.state.global_step == 1 and len(losses_of(trainer)) == 1


def test_an_error_of_the_next_windows_tensors_leaves_this_step_whole(tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows(12), "qwen3", max_steps=3)
    prepare, seen = trainer.objective.prepare, []

    def failing(*args):
        seen.append(trainer.state.global_step)
        if len(seen) == 2:
            raise ValueError("the processor refuses row 5")
        return prepare(*args)

    trainer.objective.prepare = failing
    before = [weight.clone() for weight in trainer.model.parameters()]
    with pytest.raises(ValueError, match="the processor refuses row 5"):
        trainer.train()
    assert seen == [0, 0], "the second window's tensors are made within the first step, once"
    assert trainer.state.global_step == 1 and len(losses_of(trainer)) == 1
    weights = trainer.model.parameters()
    assert any(not weight.equal(old) for weight, old in zip(weights, before, strict=True))


def test_the_first_tensors_of_the_next_window_are_made_within_the_step(tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows(12), "qwen3", max_steps=3)
    prepare, steps = trainer.objective.prepare, []

    def watched(*args):
        steps.append(trainer.state.global_step)
        return prepare(*args)

    trainer.objective.prepare = watched
    trainer.train()
    assert steps == [0, 0, 1], "before its step, once"


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_positions_are_those_that_the_model_makes(family, tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows(4, images="mixed"), family)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    tensors = trainer._prepare_inputs(batch).student.tensors
    inputs = models.forward_inputs(trainer.model, tensors)
    given = on_host.with_positions(trainer.model, inputs)
    seen = []
    below = trainer.model.model.language_model
    below.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        expected, actual = (trainer.model(**kind).logits for kind in (inputs, given))
    assert seen[0].shape[0] == 3 and (seen[0] == seen[1]).all()
    assert (actual == expected).all() and "position_ids" not in inputs
    text = {k: v for k, v in inputs.items() if "image" not in k and "pixel" not in k}
    assert "position_ids" not in on_host.with_positions(trainer.model, text)


def test_a_mask_that_was_changed_on_the_device_is_given_to_the_model(tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows(4, images=1), "qwen3_vl")
    batch = trainer.data_collator([trainer.train_dataset[0]])
    tensors = trainer._prepare_inputs(batch).student.tensors
    inputs = models.forward_inputs(trainer.model, tensors)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    there = {name: on_host.moved(value, torch.device("meta")) for name, value in tensors.items()}
    assert "attention_mask" not in on_host.with_positions(trainer.model, there)
    there["attention_mask"][:, :3] = 0  # by a hook, say
    assert on_host.host_of(there["attention_mask"]) is None
    given = on_host.with_positions(trainer.model, there)
    assert given["attention_mask"] is there["attention_mask"] and "position_ids" not in given


def test_what_follows_from_sizes_of_pictures_alone_is_computed_on_the_host():
    functions = on_host.functions_of([tiny("qwen3_vl")[0]])
    (module,) = {replacement.owner for replacement in functions}
    assert module.__name__.endswith("modeling_qwen3_vl")
    sizes = torch.tensor([[1, 4, 6], [1, 2, 2]])
    expected = module.get_vision_position_ids(sizes, 2)
    moves = []
    before, on_host._to = on_host._to, lambda value, device: moves.append(device) or value
    try:
        with all_replaced(functions):
            assert (module.get_vision_position_ids(on_device(sizes), 2) == expected).all()
            assert module.get_vision_position_ids(sizes, 2).equal(expected)
    finally:
        on_host._to = before
    assert moves == [torch.device("meta")]
    with pytest.raises(AssertionError, match="asks the device"):
        module.get_vision_position_ids(on_device(sizes), 2)


@pytest.mark.parametrize("num_tokens", [0, 5])
def test_features_are_added_where_the_model_adds_them(num_tokens):
    additions = deepstack.additions_of([tiny("qwen3_vl")[0]])
    ((kind, _, _),) = additions
    hidden, embeds = torch.randn(2, 7, 4, requires_grad=True), torch.randn(num_tokens, 4)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask.view(-1)[[1, 2, 5, 8, 13][:num_tokens]] = True
    expected = kind._deepstack_process(None, hidden, mask, embeds)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), hidden)
    with all_replaced(additions):
        actual = kind._deepstack_process(None, hidden, mask, embeds)
    (grad,) = torch.autograd.grad(actual.square().sum(), hidden)
    assert actual.equal(expected) and grad.equal(expected_grad)


class Sleeper(torch.nn.Linear):
    """Stays in evaluation mode, whatever it is told."""

    def train(self, mode=True):
        self.told = mode
        return super().train(False)


@pytest.mark.parametrize("kind", ["all in training", "one in evaluation", "one of its own mind"])
def test_a_model_is_told_to_train_unless_all_of_it_does(kind):
    last = Sleeper(2, 2) if kind == "one of its own mind" else torch.nn.Linear(2, 2)
    model, mode = torch.nn.Sequential(torch.nn.Linear(2, 2), last), TrainingMode()
    for _ in range(2):
        if kind == "one in evaluation":
            last.eval()
        with mode.kept(model):
            assert ("train" in vars(model)) == (kind == "all in training")
            assert model.train() is model
            assert [part.training for part in model] == [True, kind != "one of its own mind"]
            assert not model.train(False)[0].training
            assert model.train()[0].training
        assert "train" not in vars(model)
    assert kind != "one of its own mind" or last.told


def test_a_model_of_transformers_that_trains_is_not_told_so():
    model, mode = tiny("qwen3_vl")[0].train(), TrainingMode()
    with mode.kept(model):
        assert "train" in vars(model)

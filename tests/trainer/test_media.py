"""What models ask about pictures is answered on the host, as the device would answer."""

from functools import wraps

import pytest
import torch

from gold_trainer import models
from gold_trainer.speed import media, on_host
from gold_trainer.speed.replacing import all_replaced
from support.on_device import on_device
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import make_trainer

FAMILIES = ["qwen3_vl", "qwen2_5_vl"]


@pytest.fixture
def asked(monkeypatch):
    """Devices to which answers go; they stay here, where the model is."""
    devices = []
    monkeypatch.setattr(on_host, "_to", lambda value, device: devices.append(device) or value)
    monkeypatch.setattr(media, "sent", lambda value, device: devices.append(device) or value)
    return devices


def inputs_of(family, folder):
    trainer = make_trainer(folder, tiny_rows(3, images=1), family)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    tensors = trainer._prepare_inputs(batch).student.tensors
    return trainer.model.model, models.forward_inputs(trainer.model, tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_pictures_need_no_answer_of_the_device(family, asked, tmp_path):
    model, inputs = inputs_of(family, tmp_path)
    pixels, sizes = inputs["pixel_values"], inputs["image_grid_thw"]
    with torch.no_grad():
        expected = model.get_image_features(pixels, sizes).pooler_output
        with pytest.raises(AssertionError, match="asks the device"):
            model.get_image_features(pixels, on_device(sizes))
        with all_replaced([*media.methods_of([model]), *on_host.functions_of([model])]):
            for again in (False, True):  # from what was computed before
                actual = model.get_image_features(pixels, on_device(sizes)).pooler_output
                assert all(map(torch.equal, actual, expected)), again
                assert len(actual) == 3
            here = model.get_image_features(pixels, sizes).pooler_output
            assert all(map(torch.equal, here, expected))
    assert asked and set(asked) == {torch.device("meta")}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_given_again_to_who_asks_the_same(family, asked, tmp_path):
    model, inputs = inputs_of(family, tmp_path)
    pixels, sizes = inputs["pixel_values"], on_device(inputs["image_grid_thw"])
    answers = []
    with (
        torch.no_grad(),
        all_replaced([*media.methods_of([model]), *on_host.functions_of([model])]),
    ):
        with on_host.answers_kept(answers):
            expected = model.get_image_features(pixels, sizes).pooler_output
        num_asked = len(asked)
        assert answers and num_asked >= len(answers)
        with on_host.answers_given(answers):
            actual = model.get_image_features(pixels, sizes).pooler_output
        assert len(asked) == num_asked, "nothing went to the device"
        assert all(map(torch.equal, actual, expected))
        model.get_image_features(pixels, sizes)
        assert len(asked) > num_asked, "outside of the contexts all is as before"


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_are_found_and_counted_on_the_host(family, asked, tmp_path):
    model, inputs = inputs_of(family, tmp_path)
    ids, embeds = inputs["input_ids"], model.get_input_embeddings()(inputs["input_ids"])
    there = torch.empty(embeds.shape, device="meta")
    num_tokens = int((ids == model.config.image_token_id).sum())
    features = torch.zeros(num_tokens, embeds.shape[-1])
    expected = model.get_placeholder_mask(ids, embeds, image_features=features)
    with all_replaced(media.methods_of([model])):
        actual = model.get_placeholder_mask(on_device(ids), there, image_features=features)
        with pytest.raises(ValueError, match="do not match"):
            model.get_placeholder_mask(on_device(ids), there, image_features=features[1:])
    assert asked == [torch.device("meta")] * 2
    assert all(map(torch.equal, actual, expected)) and expected[0].sum() == num_tokens


def test_within_a_step_alone_methods_are_replaced(tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows(2, images=1), "qwen3_vl")
    kind = type(trainer.model.model)
    before = kind.get_image_features, kind.get_placeholder_mask
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with trainer.fast.running(batch, trainer.model):
        assert kind.get_image_features is not before[0]
        assert kind.get_placeholder_mask is not before[1]
    assert (kind.get_image_features, kind.get_placeholder_mask) == before
    assert media.methods_of([tiny("qwen3")[0], None]) == []


def test_positions_are_computed_ahead_and_once(monkeypatch, tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows(12, images=1), "qwen3_vl", max_steps=3)
    kind, steps = type(trainer.model.model), []
    index = kind.get_rope_index

    @wraps(index)
    def watched(self, *args, **kwargs):
        steps.append(trainer.state.global_step)
        return index(self, *args, **kwargs)

    monkeypatch.setattr(kind, "get_rope_index", watched)
    trainer.train()
    assert steps == [0, 0, 0, 0, 1, 1], "student's and teacher's, before the step, once"

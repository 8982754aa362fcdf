"""Rows padded on the right go without a mask, where models see only what is in front."""

import pytest
import torch
from transformers import masking_utils

from gold_trainer import models
from gold_trainer.speed import masks, packing
from gold_trainer.speed.kinds import TEXT
from gold_trainer.speed.masks import MASK, without_mask
from support.tiny_models import tiny, tiny_rows, tiny_text, with_lengths
from support.trainer_cases import GradientRecorder, assert_equal_steps, losses_of, make_trainer

LENGTHS = (1, 30, 7, 19)


def padded(lengths=(9, 4, 1)):
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.randint(3, 64, mask.shape), MASK: mask}


@pytest.mark.parametrize("name", TEXT)
def test_padding_behind_a_row_changes_nothing_in_it(name):
    model = tiny_text(name)
    inputs = padded()
    bare = without_mask(model, inputs, inputs[MASK])
    assert list(bare) == ["input_ids"] and MASK in inputs
    is_text = inputs[MASK].bool()
    with torch.no_grad():
        actual, expected = model(**bare).logits[is_text], model(**inputs).logits[is_text]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def step(folder, family):
    """Of a run: losses, gradients, and the masks that first layers of both models have got."""
    recorder, seen = GradientRecorder(), []
    pictures = 0 if family == "qwen3" else "mixed"
    rows = with_lengths(tiny_rows(len(LENGTHS), images=pictures), LENGTHS)
    trainer = make_trainer(folder, rows, family, callbacks=[recorder])
    for model in (trainer.model, trainer.teacher_model):
        layer = models.base_model(model).get_decoder().layers[0]
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs[MASK]), with_kwargs=True
        )
    trainer.train()
    return losses_of(trainer), recorder, seen


@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl", "qwen2_5_vl", "smolvlm", "llava"])
def test_a_step_without_masks_is_that_with_them(family, tmp_path, monkeypatch):
    losses, recorder, seen = step(tmp_path, family)
    assert seen and all(mask is None for mask in seen)
    monkeypatch.setattr(packing, "without_mask", lambda model, inputs, mask: inputs)
    losses_2, recorder_2, seen_2 = step(tmp_path, family)
    assert all(mask is not None for mask in seen_2), "rows of these lengths are padded"
    torch.testing.assert_close(losses, losses_2, rtol=1e-5, atol=1e-6)
    assert_equal_steps(recorder, recorder_2)


def is_kept(model, inputs):
    return without_mask(model, inputs, inputs[MASK]) is inputs


def test_a_mask_stays_where_it_says_more():
    model = tiny("qwen3")[0]
    assert not is_kept(model, padded())
    in_front = padded()
    in_front[MASK] = in_front[MASK].flip(1)
    assert is_kept(model, in_front)
    between = padded((9, 9, 9))
    between[MASK][1, 4] = 0
    assert is_kept(model, between)
    assert is_kept(tiny("lfm2_vl")[0], padded()), "its layers mix tokens in another way too"
    for name, value in (("is_causal", False), ("use_bidirectional_attention", True)):
        setattr(model.config, name, value)
        assert is_kept(model, padded())
        delattr(model.config, name)
    model.config.output_router_logits = True
    assert is_kept(model, padded())
    del model.config.output_router_logits
    model.config._attn_implementation = "eager"
    assert is_kept(model, padded())


def test_a_mask_that_was_changed_on_the_device_is_kept(monkeypatch):
    monkeypatch.setattr(masks, "host_of", lambda tensor: None)
    assert is_kept(tiny("qwen3")[0], padded())


def test_nobody_looks_for_rows_that_share_a_sequence(tmp_path, monkeypatch):
    def wait(position_ids):
        raise AssertionError("the device is asked")

    monkeypatch.setattr(masking_utils, masks.SHARED, wait)
    step(tmp_path, "qwen3")
    assert getattr(masking_utils, masks.SHARED) is wait
    with pytest.raises(AssertionError, match="the device is asked"):
        tiny("qwen3")[0](torch.ones(1, 3, dtype=torch.int64), use_cache=False)


def test_models_that_see_what_stands_behind_cannot_share_a_sequence(tmp_path):
    student = tiny("qwen3")[0]
    student.config.is_causal = False
    with pytest.raises(ValueError, match="is_causal=False, whose tokens see those behind them"):
        make_trainer(tmp_path, tiny_rows(4), "qwen3", student=student, padding_free=True)


@pytest.mark.gpu
def test_on_a_gpu_no_pass_over_text_waits(tmp_path, monkeypatch):
    """The first step measures the form of logits, which is read back."""
    rows = with_lengths(tiny_rows(8, images=0), LENGTHS * 2)
    trainer = make_trainer(
        *(tmp_path, rows, "qwen3"), max_steps=2, use_cpu=False, bf16=True, compile_models="off"
    )
    compute_loss = trainer.compute_loss

    def watched(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error" if trainer.state.global_step else "default")
        try:
            return compute_loss(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.train()
    assert trainer.state.global_step == 2

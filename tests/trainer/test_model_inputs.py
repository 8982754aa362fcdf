"""What a model's forward gets beside tokens: the tensors of the text reach over the answer, all
others are as the processor made them, and nothing else comes in.
"""

import copy

import pytest
import torch

from gold_trainer import models
from gold_trainer.data.dataset import RowDataset
from gold_trainer.rendering.collator import GOLDCollator, build_inputs
from support.eager_step import completion_of, eager_step
from support.tiny_models import tiny, tiny_rows
from support.tiny_more import tiny_more
from support.trainer_cases import assert_equal_gradients, losses_of, make_trainer, one_step

FAMILIES = ("mllama", "paligemma", "granite_vision")


def rows_of(family: str):
    """One, two and no pictures, where that is possible: PaliGemma's processor takes no text without
    pictures, and in Llama 3.2 Vision text in front of pictures sees the padding of other rows'.
    """
    return tiny_rows(3, images="mixed" if family == "granite_vision" else 1)


def inputs_of(processor, rows):
    dataset = RowDataset(rows, needs_completion=True, is_text=False)
    collator = GOLDCollator(processor, [processor.tokenizer.eos_token_id], None)
    return build_inputs(processor, [collator.example(dataset[i]) for i in range(len(rows))])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_equals_the_eager_float64_step(family, side, tmp_path):
    (student, processor), (teacher, _) = (tiny_more(family, s) for s in ("student", "teacher"))
    rows = rows_of(family)
    completions = [completion_of(family, processor, row) for row in rows]
    assert len({len(ids) for ids in completions}) > 1
    expected_loss, expected = eager_step(student, teacher, processor, rows, completions)
    processor.tokenizer.padding_side = side
    options = {"processor": processor, "per_device_train_batch_size": len(rows)}
    loss, gradients = one_step(tmp_path, rows, student=student, teacher=teacher, **options)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_equal_gradients(
        {name: gradients[name].double() for name in expected}, expected, relative=1e-4
    )
    assert any("vision" in name and g.any() for name, g in expected.items())


def test_rows_without_pictures_keep_their_place_among_llamas():
    """The stock processor leaves them out of the aspect ratios."""
    student, processor = tiny_more("mllama")
    rows = tiny_rows(6, images="mixed")
    rows = [rows[2], *rows[:2]]
    assert [len(row["images"]) for row in rows] == [0, 1, 2]
    tensors = inputs_of(processor, rows).tensors
    for b, row in enumerate(rows):
        if row["images"]:
            alone = inputs_of(processor, [row]).tensors
            for name in ("aspect_ratio_ids", "aspect_ratio_mask", "pixel_values"):
                own = tensors[name][b : b + 1, : len(row["images"])]
                assert torch.equal(own, alone[name]), name
    assert not tensors["aspect_ratio_ids"][0].any()
    assert tensors["aspect_ratio_mask"][0].tolist() == [[1, 0, 0, 0]] * 2
    with torch.no_grad():
        assert student(**models.forward_inputs(student, tensors)).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_of_batches_with_pictures_train(family, tmp_path):
    (student, processor), (teacher, _) = (tiny_more(family, s) for s in ("student", "teacher"))
    options = {"processor": processor, "lmbda": 1.0, "per_device_train_batch_size": 3}
    rows = rows_of(family) if family == "paligemma" else tiny_rows(3, images="mixed")
    trainer = make_trainer(tmp_path, rows, student=student, teacher=teacher, max_steps=2, **options)
    trainer.train()
    assert len(losses_of(trainer)) == 2 and losses_of(trainer)[0] > 0


def test_cross_attention_mask_goes_on_as_at_the_end_of_the_prompt():
    _, processor = tiny_more("mllama")
    inputs = inputs_of(processor, tiny_rows(3, images="mixed"))
    mask, ids = inputs.tensors["cross_attention_mask"], inputs.tensors["input_ids"]
    assert mask.shape[:2] == ids.shape and mask.any()
    is_answer = inputs.labels != -100
    for b in range(len(ids)):
        first = is_answer[b].nonzero()[0].item()
        assert (mask[b][is_answer[b]] == mask[b, first - 1]).all()
    is_padding = inputs.tensors["attention_mask"] == 0
    assert is_padding.any() and not mask[is_padding].any()


def test_answers_to_paligemma_are_causal_and_its_labels_go_nowhere():
    student, processor = tiny_more("paligemma")
    inputs = inputs_of(processor, rows_of("paligemma"))
    types, is_answer = inputs.tensors["token_type_ids"], inputs.labels != -100
    assert (types[is_answer] == 1).all() and not types[~is_answer].any()
    assert "labels" not in inputs.tensors
    tensors = inputs.tensors | {"labels": inputs.labels, "num_crops": torch.ones(3)}
    made = models.forward_inputs(student, tensors)
    assert "num_crops" not in made and made["use_cache"] is False
    assert made.keys() == {*inputs.tensors, "labels", "use_cache"}
    forward = copy.copy(made)
    forward["input_ids"] = made["input_ids"].clone()
    forward["input_ids"][is_answer] = processor.tokenizer.eos_token_id
    with torch.no_grad():
        logits = [student(**{**m, "labels": None}).logits for m in (made, forward)]
    first = inputs.labels[0].ne(-100).nonzero()[0].item()
    torch.testing.assert_close(logits[0][0, :first], logits[1][0, :first])


def test_patches_with_the_shape_of_the_text_are_not_text():
    """LFM2-VL: one row of as many patches as tokens."""
    _, processor = tiny("lfm2_vl")
    row = tiny_rows(1, images=1)[0]
    for words in range(40):
        text = "a " * words + "b"
        messages = [{"role": "user", "content": text}, row["messages"][1]]
        inputs = inputs_of(processor, [row | {"messages": messages}])
        _, patches = inputs.tensors["pixel_attention_mask"].shape
        num_answer = int((inputs.labels != -100).sum())
        if inputs.tensors["input_ids"].shape[1] - num_answer == patches:
            break
    else:
        raise AssertionError("no prompt is as long as the patches")
    expected = processor.image_processor(images=row["images"], return_tensors="pt")
    assert torch.equal(inputs.tensors["pixel_attention_mask"], expected["pixel_attention_mask"])
    assert inputs.tensors["attention_mask"].shape == (1, patches + num_answer)

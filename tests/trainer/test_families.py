"""Every family through the real trainer: the step equals the eager full-logits step in float64."""

import math
from copy import deepcopy

import pytest
import torch

from gold_trainer import GOLDConfig, GOLDTrainer
from support.eager_step import completion_of, eager_step
from support.tiny_models import FAMILIES, VLM_FAMILIES, tiny, tiny_rows
from support.trainer_cases import (
    FIELDS,
    GradientRecorder,
    assert_equal_gradients,
    losses_of,
    make_trainer,
    parts_of,
    recorded_warnings,
)

MAX_NEW_TOKENS = 6


def rows_of(family: str, count: int = 3) -> list[dict]:
    """Mixed lengths; for VLMs rows with one, two and no pictures of mixed sizes."""
    return tiny_rows(count, images="mixed" if family in VLM_FAMILIES else 0)


def build_trainer(family, output_dir, rows, student=None, processor=None, **fields):
    """Trainer whose first batch is `rows` in order, with its recorder; plain SGD, no clipping."""
    fresh_student, fresh_processor = tiny(family)
    recorder = GradientRecorder()
    batch = {"per_device_train_batch_size": len(rows), "max_completion_length": 64, "max_steps": 2}
    trainer = GOLDTrainer(
        model=fresh_student if student is None else student,
        teacher_model=tiny(family, "teacher")[0],
        args=GOLDConfig(output_dir=str(output_dir), **(FIELDS | batch | fields)),
        train_dataset=rows,
        processing_class=fresh_processor if processor is None else processor,
        callbacks=[recorder],
    )
    return trainer, recorder


def shared_entries(family: str, processor) -> int | None:
    """Columns of the loss: all rows of equal heads, the tokenizer's entries where they differ."""
    heads = {
        tiny(family, size)[0].get_output_embeddings().weight.shape[0]
        for size in ("student", "teacher")
    }
    return None if len(heads) == 1 else len(getattr(processor, "tokenizer", processor))


def assert_equals_eager_step(family, trainer, recorder, rows, completions, beta=0.5):
    """Loss and every gradient of the trainer's first step."""
    student, processor = tiny(family)
    expected_loss, expected = eager_step(
        student,
        tiny(family, "teacher")[0],
        processor,
        rows,
        completions,
        beta=beta,
        vocab_size=shared_entries(family, processor),
    )
    assert losses_of(trainer)[0] == pytest.approx(expected_loss, rel=1e-5)
    present = {name for name, gradient in recorder.gradients.items() if gradient.any()}
    assert present == {name for name, gradient in expected.items() if gradient.any()}
    for name, gradient in expected.items():
        error = (recorder.gradients[name].double() - gradient).norm() / gradient.norm()
        # Biases in front of a softmax have a gradient of zero but for rounding.
        assert error < 1e-4 or gradient.norm() < 1e-9, f"{name}: relative error {error:.1e}"


def assert_gradients_reach_every_part(family, model, gradients):
    for part, names in parts_of(model).items():
        norms = [gradients[name].norm() for name in names if name in gradients]
        is_reached = any(norm > 0 for norm in norms)
        assert is_reached == (part != "vision" or family in VLM_FAMILIES), f"gradient in {part}"


@pytest.mark.parametrize("family", FAMILIES)
def test_off_policy_step_equals_the_eager_float64_step(family, tmp_path):
    rows = rows_of(family)
    trainer, recorder = build_trainer(family, tmp_path, rows)
    with recorded_warnings() as messages:
        trainer.train()
    assert messages == []
    assert len(losses_of(trainer)) == 2
    assert all(math.isfinite(loss) for loss in losses_of(trainer))
    assert_gradients_reach_every_part(family, trainer.model, recorder.gradients)
    _, processor = tiny(family)
    completions = [completion_of(family, processor, row) for row in rows]
    assert len({len(completion) for completion in completions}) > 1, "lengths must be mixed"
    assert_equals_eager_step(family, trainer, recorder, rows, completions)


@pytest.mark.parametrize("family", FAMILIES)
def test_on_policy_step_equals_the_eager_step_on_what_was_generated(family, tmp_path):
    rows = rows_of(family)
    student, _ = tiny(family)
    trainer, recorder = build_trainer(
        family,
        tmp_path,
        rows,
        student,
        lmbda=1.0,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=1.0,
    )
    writer, written = trainer.rollouts.writers["student"], []
    complete = writer.complete
    writer.complete = lambda *asked: written.append(complete(*asked)) or written[-1]
    trainer.train()
    assert len(losses_of(trainer)) == 2
    completions = [c.token_ids for batch in written for part in batch for c in part][: len(rows)]
    assert_equals_eager_step(family, trainer, recorder, rows, completions)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_side_changes_nothing(family, tmp_path):
    losses = []
    for side in ("left", "right"):
        _, processor = tiny(family)
        getattr(processor, "tokenizer", processor).padding_side = side
        trainer, _ = build_trainer(family, tmp_path, rows_of(family), processor=processor)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    rows = rows_of("qwen3_vl")
    trainer, recorder = build_trainer("qwen3_vl", tmp_path, rows, gradient_checkpointing=True)
    trainer.train()
    _, processor = tiny("qwen3_vl")
    completions = [completion_of("qwen3_vl", processor, row) for row in rows]
    assert_equals_eager_step("qwen3_vl", trainer, recorder, rows, completions)


@pytest.mark.parametrize("family", ["qwen3_vl", "idefics3"])
@pytest.mark.parametrize("images", [1, 2])
def test_batches_of_equal_picture_counts_train_too(family, images, tmp_path):
    rows = tiny_rows(2, images=images)
    trainer, recorder = build_trainer(family, tmp_path, rows, max_steps=1)
    trainer.train()
    _, processor = tiny(family)
    completions = [completion_of(family, processor, row) for row in rows]
    assert_equals_eager_step(family, trainer, recorder, rows, completions)


def without_image_row(size):
    """A model whose head ends before the picture's token, which only its embeddings have."""
    model, processor = tiny("llava", size)
    num_rows = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert num_rows == len(processor.tokenizer) - 1 < model.get_input_embeddings().num_embeddings
    head = torch.nn.Linear(model.lm_head.in_features, num_rows, bias=False)
    head.weight.data.copy_(model.lm_head.weight[:num_rows])
    model.lm_head = head
    return model


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_picture_token_beyond_both_heads_trains(lmbda, tmp_path):
    """As Llama 3.2 Vision: 128256 rows of the head, <|image|> is token 128256."""
    rows, recorder = rows_of("llava"), GradientRecorder()
    student, teacher = without_image_row("student"), without_image_row("teacher")
    options = {"teacher": teacher, "lmbda": lmbda, "callbacks": [recorder], "max_steps": 1}
    options |= {"per_device_train_batch_size": len(rows)}
    trainer = make_trainer(tmp_path, rows, "llava", student=student, **options)
    before, examples = deepcopy(student), []
    build = trainer.rollouts.complete

    def complete(*args):
        batches = build(*args)
        examples.extend(batches[0].examples)
        return batches

    trainer.rollouts.complete = complete
    trainer.train()
    completions = [example.completion_ids for example in examples]
    _, processor = tiny("llava")
    if lmbda == 0:
        assert completions == [completion_of("llava", processor, row) for row in rows]
    expected_loss, expected = eager_step(before, teacher, processor, rows, completions, beta=0.5)
    assert losses_of(trainer)[0] == pytest.approx(expected_loss, rel=1e-5)
    assert_equal_gradients(
        {name: recorder.gradients[name].double() for name in expected}, expected, relative=1e-4
    )


def test_picture_token_beyond_both_heads_is_refused_in_an_answer(tmp_path):
    sides = {size: without_image_row(size) for size in ("student", "teacher")}
    answer = {"role": "assistant", "content": "An <image>."}
    row = {"messages": [{"role": "user", "content": "What is this?"}, answer]}
    message = r"^row 0: a completion must be text, got a picture's placeholder in .*<image>.*; rem"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, [row], "llava", **sides).train()


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_beta_reaches_the_loss(beta, tmp_path):
    rows = rows_of("qwen3")
    trainer, recorder = build_trainer("qwen3", tmp_path, rows, beta=beta, max_steps=1)
    trainer.train()
    _, processor = tiny("qwen3")
    completions = [completion_of("qwen3", processor, row) for row in rows]
    assert_equals_eager_step("qwen3", trainer, recorder, rows, completions, beta=beta)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_gradient_accumulation_equals_one_large_batch(accumulation, tmp_path):
    rows = rows_of("qwen3_vl", count=4)
    trainer, recorder = build_trainer(
        "qwen3_vl",
        tmp_path,
        rows,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    _, processor = tiny("qwen3_vl")
    completions = [completion_of("qwen3_vl", processor, row) for row in rows]
    assert_equals_eager_step("qwen3_vl", trainer, recorder, rows, completions)

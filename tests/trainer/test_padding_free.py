"""Rows that share a sequence without padding learn what padded rows learn."""

import importlib
import inspect
import re

import pytest
import torch
from peft import LoraConfig

from gold_trainer import GOLDConfig, GOLDTrainer, models
from gold_trainer.speed import on_host, packing
from gold_trainer.speed.compiling import CompiledStep
from gold_trainer.speed.segments import attention_is
from support.cross_cases import cross_trainer, make_sides
from support.tiny_models import save_tiny, tiny, tiny_rows, tiny_text, with_lengths
from support.trainer_cases import (
    FIELDS,
    GradientRecorder,
    assert_equal_steps,
    losses_of,
    make_trainer,
)

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
LENGTHS = (1, 30, 7, 19)
TWO_BATCHES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def rows_of_lengths(has_pictures=True):
    return with_lengths(tiny_rows(len(LENGTHS), images="mixed" if has_pictures else 0), LENGTHS)


def watch(model):
    """Shapes of what the model's first layer sees."""
    shapes = []
    layer = models.base_model(model).get_decoder().layers[0]
    layer.self_attn.q_proj.register_forward_hook(
        lambda module, args, output: shapes.append(output.shape[:2])
    )
    return shapes


def run(folder, family, **fields):
    recorder = GradientRecorder()
    rows = rows_of_lengths(has_pictures=family not in ("qwen3", "llama"))
    trainer = make_trainer(folder, rows, family, callbacks=[recorder], **fields)
    return finish(trainer, recorder)


def finish(trainer, recorder):
    shapes = [watch(model) for model in (trainer.model, trainer.teacher_model)]
    trainer.train()
    return trainer, recorder, shapes


def assert_packed(padded, free):
    """The same losses and gradients, of models that have seen rows and no padding."""
    (trainer, recorder, shapes), (trainer_2, recorder_2, shapes_2) = padded, free
    torch.testing.assert_close(losses_of(trainer), losses_of(trainer_2), rtol=1e-5, atol=1e-6)
    assert_equal_steps(recorder_2, recorder)
    for seen, seen_2 in zip(shapes, shapes_2, strict=True):
        assert len(seen_2) == len(seen) and {shape[0] for shape in seen_2} == {1}
        assert sum(shape.numel() for shape in seen_2) < sum(shape.numel() for shape in seen)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", TWO_BATCHES),
        ("qwen3_vl", {"gradient_checkpointing": True, "peft_config": LORA}),
        ("qwen2_5_vl", {}),
        ("llava", {}),
        ("smolvlm", {}),
    ],
)
def test_loss_and_gradient_are_those_of_padded_rows(family, fields, tmp_path):
    padded = run(tmp_path, family, **fields)
    free = run(tmp_path, family, padding_free=True, **fields)
    assert_packed(padded, free)


def test_each_of_two_families_is_packed_by_itself(tmp_path):
    def across(**fields):
        student, teacher = make_sides("qwen3_vl", "smolvlm")
        rows = rows_of_lengths()
        return finish(*cross_trainer(tmp_path, rows, student, teacher, max_steps=1, **fields))

    assert_packed(across(), across(padding_free=True))


def test_a_student_that_is_its_own_teacher_is_packed_with_and_without_its_adapter(tmp_path):
    def own(**fields):
        recorder = GradientRecorder()
        student, processor = tiny("qwen3")
        torch.manual_seed(0)
        trainer = GOLDTrainer(
            model=student,
            args=GOLDConfig(output_dir=str(tmp_path), **FIELDS, **fields),
            train_dataset=rows_of_lengths(has_pictures=False),
            processing_class=processor,
            peft_config=LORA,
            callbacks=[recorder],
        )
        return finish(trainer, recorder)

    assert_packed(own(), own(padding_free=True))


def test_each_of_several_teachers_is_packed_and_compiled(tmp_path):
    def several(**fields):
        recorder = GradientRecorder()
        rows = [
            row | {"teacher_id": "one" if i % 2 else "two"}
            for i, row in enumerate(rows_of_lengths(has_pictures=False))
        ]
        trainer = GOLDTrainer(
            model=tiny("qwen3")[0],
            args=GOLDConfig(
                output_dir=str(tmp_path / "run"),
                **FIELDS,
                teacher_models={key: str(tmp_path / key) for key in ("one", "two")},
                **fields,
            ),
            train_dataset=rows,
            processing_class=tiny("qwen3")[1],
            callbacks=[recorder],
        )
        teachers = [teacher.model for teacher in trainer.teacher.teachers.values()]
        shapes = [watch(model) for model in (trainer.model, *teachers)]
        trainer.train()
        return trainer, recorder, shapes

    for seed, key in enumerate(("one", "two")):
        save_tiny(tmp_path / key, "qwen3", "teacher", seed=seed)
    free = several(padding_free=True)
    assert_packed(several(), free)
    free[0].args.compile_models = "regional"
    names = [kind.name for kind in CompiledStep(free[0].args, free[0].fast.sides).kinds]
    assert [name.partition(" of the ")[2] for name in names] == [
        "student",
        "teacher 'one'",
        "teacher 'two'",
    ]


def test_outside_of_a_step_rows_are_padded_and_attention_is_the_models_own(tmp_path):
    rows = rows_of_lengths(has_pictures=False)
    trainer = make_trainer(
        *(tmp_path, rows, "qwen3"), eval_rows=rows, padding_free=True, lmbda=1.0, max_length=None
    )
    configs = trainer.fast.packing.configs
    assert len(configs) == 2
    shapes = watch(trainer.model)
    before = trainer.evaluate()["eval_loss"]
    assert {shape[0] for shape in shapes} == {len(rows)}
    trainer.train()
    assert {config._attn_implementation for config in configs} == {"sdpa"}
    other = make_trainer(tmp_path, rows, "qwen3", eval_rows=rows, max_length=None)
    assert other.evaluate()["eval_loss"] == before
    difference = trainer.state.log_history[-2]["sampling/sampling_logp_difference/max"]
    assert difference < 1e-4, "rollouts are checked at the rows of the packed sequence"


def packed_logits(model, ids, mask):
    inputs = {"input_ids": ids, "attention_mask": mask}
    rows = mask.flatten().nonzero()[:, 0]
    with attention_is(packing.OF_ROWS, packing._configs(model)), torch.no_grad():
        packed, places = packing.packed(model, inputs, mask, rows)
        assert places.tolist() == list(range(len(rows))) and "attention_mask" not in packed
        return model(**packed).logits[0]


def test_attention_in_windows_stays_within_its_row():
    model = tiny_text("mistral")
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    ids = torch.randint(64, mask.shape)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(packed_logits(model, ids, mask), expected, rtol=1e-5, atol=1e-6)
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert (packed_logits(model, ids, mask) - expected).abs().max() > 1e-3


def test_a_mask_that_was_changed_on_the_device_is_read_there(monkeypatch):
    mask = torch.ones(2, 3, dtype=torch.int64)
    monkeypatch.setattr(packing, "host_of", lambda tensor: None)
    assert on_host.host_of(mask) is mask and packing._on_host(mask).equal(mask)


def refusal_of(family, tmp_path, **options):
    fields = {"padding_free": True, **options}
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, tiny_rows(4), family, **fields)
    return str(error.value)


def test_models_whose_rows_cannot_share_a_sequence_are_refused_by_name(tmp_path, monkeypatch):
    start = "GOLDTrainer: padding_free must be False for models whose rows cannot share a sequence"
    for family in ("lfm2_vl", "gemma3"):
        message = refusal_of(family, tmp_path)
        assert message.startswith(f"{start}, got True and a student of the type {family};")
    student = tiny("qwen3")[0]
    student.set_attn_implementation("eager")
    message = refusal_of("qwen3", tmp_path, student=student)
    assert "a student with the attention 'eager'; sdpa, flash_attention_2" in message
    student = tiny("qwen3")[0]
    student.config.attention_dropout = 0.1
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.1
    message = refusal_of("qwen3", tmp_path, student=student, disable_dropout=False)
    assert "a student that drops out attention; set disable_dropout=True" in message
    student = tiny("qwen3")[0]
    student.config.layer_types = ["full_attention", "linear_attention"]
    message = refusal_of("qwen3", tmp_path, student=student)
    assert "with layers of the kind linear_attention; attention is known" in message
    student = tiny("qwen3")[0]
    student.config.sliding_window = 3
    monkeypatch.setattr(packing, "WINDOW_IN_ONE", ("qwen3",))
    for kinds in (["full_attention", "sliding_attention"], None):
        student.config.layer_types = kinds
        message = refusal_of("qwen3", tmp_path, student=student)
        assert "of the type qwen3 with a window; sliding_window=None is known" in message
    message = refusal_of("qwen3", tmp_path, neftune_noise_alpha=5.0)
    assert "noise goes by the length of its rows; neftune_noise_alpha must be unset" in message


def test_of_the_known_types_two_have_their_window_in_mask_or_attention_alone():
    """Of transformers' own code: an attention that is to keep its window has to be told it."""
    for name in packing.TEXT:
        folder = name.removesuffix("_text")
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        code = inspect.getsource(module)
        has_window = code.count("create_sliding_window_causal_mask") > 1  # imported, and called
        is_told = re.search(r"^ +sliding_window=.+,", code, re.MULTILINE) is not None
        assert (has_window != is_told) == (name in packing.WINDOW_IN_ONE), name


def test_rows_are_padded_unless_it_is_asked_for(tmp_path):
    trainer, _, shapes = run(tmp_path, "qwen3")
    assert trainer.args.padding_free is False
    assert {shape[0] for seen in shapes for shape in seen} == {len(LENGTHS)}

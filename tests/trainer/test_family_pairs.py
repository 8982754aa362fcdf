"""Every vision-language family as student of every other and of itself: two steps of the real
trainer with gradient checkpointing and mixed lengths, picture counts and picture sizes.

What a step computes is in test_families.py and test_cross_family.py; here is that nothing about a
pair breaks it: finite losses, gradients where they belong, no input lost, no warning.
"""

import inspect
import math
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from gold_trainer import GOLDTrainer, models
from gold_trainer.speed.kinds import reason_against_kind
from support.cross_cases import Side, completions_of, cross_trainer, make_sides, rows_of
from support.eager_step import prompt_inputs
from support.tiny_models import VLM_FAMILIES, tiny
from support.trainer_cases import GradientRecorder, parts_of, recorded_warnings

BATCH_SIZE = 3  # rows of one, two and no pictures
# Who writes each step's completions, and the fields that make it so.
POLICIES: dict[tuple[str, str], dict[str, Any]] = {
    ("dataset", "dataset"): {"lmbda": 0.0},
    ("student", "student"): {"lmbda": 1.0, "max_completion_length": 8},
    ("dataset", "student"): {"lmbda": 0.5, "max_completion_length": 8, "seed": 3},
    ("student", "dataset"): {"lmbda": 0.5, "max_completion_length": 8, "seed": 1},
}
OFF, ON, OFF_THEN_ON, ON_THEN_OFF = POLICIES


class Scheme(NamedTuple):
    """Options of a run."""

    is_hybrid: bool
    student_padding: str
    teacher_padding: str
    sources: tuple[str, str]
    frozen: str | None  # part of the student


# By the distance of the two families in VLM_FAMILIES, so that each family meets every line once as
# student and once as teacher.
CROSS_SCHEMES = (
    Scheme(False, "left", "left", OFF, None),
    Scheme(True, "right", "left", ON, None),
    Scheme(False, "right", "right", OFF_THEN_ON, "vision"),
    Scheme(True, "left", "right", ON_THEN_OFF, "head"),
    Scheme(False, "left", "right", ON, None),
    Scheme(True, "right", "left", OFF, None),
)
CROSS_PAIRS = [
    (student, VLM_FAMILIES[(i + distance) % len(VLM_FAMILIES)], scheme)
    for i, student in enumerate(VLM_FAMILIES)
    for distance, scheme in enumerate(CROSS_SCHEMES, 1)
]
# Both policies in each; one side's inputs serve both models.
FAMILY_SCHEMES = [
    (
        family,
        Scheme(
            False,
            *(("left", "right")[i % 2],) * 2,
            (OFF_THEN_ON, ON_THEN_OFF)[i // 2 % 2],
            (None, "vision", "head")[i % 3],
        ),
    )
    for i, family in enumerate(VLM_FAMILIES)
]


def write_ascii(trainer: GOLDTrainer, student: Side) -> None:
    """Let the model sample plain text only. Random weights write broken UTF-8 most of the time, of
    which little can be aligned and now and then nothing.
    """
    sampling, tokenizer = trainer.rollouts.sampling["student"], student.tokenizer
    ids = sorted(sampling.token_ids)
    texts = tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=True)
    plain = {i for i, text in zip(ids, texts, strict=True) if text and text.isascii()}
    token_ids = frozenset(plain | {tokenizer.eos_token_id})
    trainer.rollouts.sampling["student"] = replace(sampling, token_ids=token_ids)


def record_inputs(model: nn.Module, is_student: bool) -> list[tuple[set[str], str]]:
    """What each forward of a training step is given: names and the side of the padding. The student
    generates in eval mode, the teacher not at all.
    """
    calls: list[tuple[set[str], str]] = []

    def record(module, args, kwargs):
        if module.training == is_student:
            mask = kwargs.get("attention_mask")  # none where all padding is on the right
            is_right = mask is None or bool(mask[:, 0].all())
            calls.append((set(kwargs), "right" if is_right else "left"))

    model.register_forward_pre_hook(record, with_kwargs=True)
    return calls


def count_first_layer(model: nn.Module) -> list[bool]:
    """One entry each time the language model's first layer computes in a training step."""
    calls: list[bool] = []
    name = parts_of(model)["language"][0]
    layer = model.get_submodule(name[: name.index("layers.0") + len("layers.0")])
    # Within the layer: hooks of the layer itself are not part of what is computed again.
    linear = next(module for module in layer.modules() if isinstance(module, nn.Linear))
    linear.register_forward_pre_hook(
        lambda module, _: calls.append(True) if module.training else None
    )
    return calls


def check_rows(student: Side, rows: list[dict[str, Any]]) -> None:
    """The precondition: every batch is mixed."""
    for batch in (rows[:BATCH_SIZE], rows[BATCH_SIZE:]):
        pictures = [row["images"] for row in batch]
        assert sorted(map(len, pictures)) == [0, 1, 2]
        assert len({picture.size for row in pictures for picture in row}) > 1
        assert len({len(ids) for ids in completions_of(student, batch)}) > 1


def check_parts(
    student: Side, before: dict[str, Tensor], recorder: GradientRecorder, frozen: str | None
) -> None:
    """Each part has gradients in each step and other parameters after them, or none and the same
    ones where it is frozen.
    """
    after = student.model.state_dict()
    for part, names in parts_of(student.model).items():
        assert names, part
        for step, gradients in enumerate(recorder.steps):
            assert all(gradient.isfinite().all() for gradient in gradients.values())
            own = [gradients[name] for name in names if name in gradients]
            assert any(gradient.any() for gradient in own) == (part != frozen), (part, step)
            assert part != frozen or not own
        has_changed = any(not torch.equal(after[name], before[name]) for name in names)
        assert has_changed == (part != frozen), part


def assert_two_steps_train(
    output_dir: Any, student: Side, teacher: Side, scheme: Scheme, **fields: Any
) -> None:
    student.tokenizer.padding_side = scheme.student_padding
    teacher.tokenizer.padding_side = scheme.teacher_padding
    for name in parts_of(student.model).get(scheme.frozen, ()):
        student.model.get_parameter(name).requires_grad_(False)
    rows = rows_of(student.family, count=2 * BATCH_SIZE)
    check_rows(student, rows)
    before = [deepcopy(side.model.state_dict()) for side in (student, teacher)]
    inputs = record_inputs(student.model, True), record_inputs(teacher.model, False)
    layer_calls = count_first_layer(student.model)
    fields = POLICIES[scheme.sources] | {"use_uld_loss": False} | fields
    with recorded_warnings() as messages:
        trainer, recorder = cross_trainer(
            output_dir,
            rows,
            student,
            teacher,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_checkpointing=True,
            **fields,
        )
        write_ascii(trainer, student)
        trainer.train()
    assert [m for m in messages if "activation_checkpointing" not in m] == []  # its new name

    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == len(recorder.steps) == 2
    for step, (entry, source) in enumerate(zip(entries, scheme.sources, strict=True)):
        assert trainer.rollouts.source(step, 0) == source
        assert math.isfinite(entry["loss"]) and entry["loss"] > 0
        assert ("uld_loss" in entry) == fields["use_uld_loss"]
    assert len(layer_calls) == 2 * 2, "each step runs a checkpointed layer twice"
    check_parts(student, before[0], recorder, scheme.frozen)

    givers = student, teacher if fields["use_uld_loss"] else student
    for side, calls, giver in zip((student, teacher), inputs, givers, strict=True):
        made = set(prompt_inputs(giver.processor, rows[0]))
        if "image_grid_thw" in made:  # positions of M-RoPE, which the model would wait for
            made.add("position_ids")
        needed = made | {"use_cache"}
        if reason_against_kind(models.base_model(side.model)) is None:  # padding changes nothing
            needed -= {"attention_mask"}
        # the form of a teacher's logits is measured before the first of two steps
        assert calls == [(needed, "right")] * (2 if side is student else 3)
        assert made <= inspect.signature(type(side.model).forward).parameters.keys()
    state = teacher.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before[1].items())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


@pytest.mark.parametrize(
    ("student", "teacher", "scheme"), CROSS_PAIRS, ids=["-".join(pair[:2]) for pair in CROSS_PAIRS]
)
def test_two_steps_across_families(student, teacher, scheme, tmp_path):
    student, teacher = make_sides(student, teacher)
    is_hybrid = scheme.is_hybrid
    options = {"use_uld_loss": True, "uld_use_hybrid_loss": is_hybrid}
    assert_two_steps_train(tmp_path, student, teacher, scheme, **options)


@pytest.mark.parametrize(("family", "scheme"), FAMILY_SCHEMES, ids=VLM_FAMILIES)
def test_two_steps_within_a_family(family, scheme, tmp_path):
    student, teacher = (Side(family, *tiny(family, size)) for size in ("student", "teacher"))
    assert_two_steps_train(tmp_path, student, teacher, scheme)

"""Weights from what a picture's detail tells the teacher (VA-OPD): the formula, and a step that
equals the eager float64 step with a second look of the teacher.
"""

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from gold_trainer import GOLDConfig
from gold_trainer.weighting.picture_detail import PictureDetail
from gold_trainer.weighting.weighting import make_weighting
from support.cross_cases import (
    assert_step_is_eager,
    make_sides,
    off_policy_parts,
    rows_of,
)
from support.eager_step import eager_step, prompt_inputs, scored_logits
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import (
    GradientRecorder,
    assert_equal_gradients,
    losses_of,
    make_trainer,
    record_completions,
)

DETAIL = {"token_weighting": "picture_detail"}


def coarse(row, scale=0.1):
    def squares(picture):
        size = [max(1, int(side * scale)) for side in picture.size]
        return picture.resize(size, Image.Resampling.BILINEAR).resize(picture.size, 0)

    return {**row, "images": [squares(picture) for picture in row["images"]]}


def weights_of_one(advantage, high_fraction=0.2, high_weight=0.5):
    """Of a completion alone."""
    number = len(advantage)
    num_high = math.ceil(high_fraction * number)
    if num_high == number:
        return [1.0] * number
    order = sorted(range(number), key=lambda t: (-advantage[t], t))
    high, low = high_weight / num_high, (1 - high_weight) / (number - num_high)
    return [number * (high if t in order[:num_high] else low) for t in range(number)]


def advantage_of(teacher, processor, row, ids):
    """(T,) of a completion, in float64."""
    logs = [
        scored_logits(teacher, prompt_inputs(processor, view), ids).log_softmax(-1)
        for view in (row, coarse(row))
    ]
    return (logs[0] - logs[1])[torch.arange(len(ids)), ids].clamp_min(0)


def tokens_of(values, rows, pictures, compared=None):
    """What PictureDetail reads: VA of each completion's tokens."""
    sizes = torch.tensor([len(own) for own in values])
    flat = torch.tensor([value for own in values for value in own])
    examples = [
        SimpleNamespace(index=row, turn=None, images=[1] * has)
        for row, has in zip(rows, pictures, strict=True)
    ]
    return SimpleNamespace(
        batch=SimpleNamespace(teacher=SimpleNamespace(examples=examples)),
        completions=torch.arange(len(values)).repeat_interleave(sizes),
        is_compared=torch.ones_like(flat, dtype=torch.bool) if compared is None else compared,
        teacher_log_probs=lambda: flat,
        teacher_log_probs_without_detail=lambda: torch.zeros_like(flat),
        to_device=lambda tensor: tensor,
    )


def test_weights_are_those_of_the_formula():
    """Two prompts of three and two completions, one of them empty, and a row without a picture."""
    torch.manual_seed(0)
    lengths, rows = [7, 1, 12, 0, 5, 6], [4, 4, 4, 9, 9, 2]
    values = [torch.randn(n).tolist() for n in lengths]  # those below 0 tell nothing
    detail = PictureDetail(temperature=0.7, high_weight=0.6, high_fraction=0.3)
    weights = detail(tokens_of(values, rows, [1, 1, 1, 1, 1, 0])).split(lengths)
    known = [[max(0.0, value) for value in own] for own in values]
    means = [sum(own) / len(own) for own in known[:3]]
    middle = sum(means) / 3
    deviation = math.sqrt(sum((mean - middle) ** 2 for mean in means) / 3)
    odds = [math.exp((mean - middle) / (deviation + 1e-6) / 0.7) for mean in means]
    for i in range(3):
        factor = odds[i] / sum(odds) * sum(lengths[:3]) / lengths[i]
        expected = [factor * weight for weight in weights_of_one(known[i], 0.3, 0.6)]
        assert weights[i].tolist() == pytest.approx(expected, rel=1e-5)
    assert weights[4].tolist() == pytest.approx(weights_of_one(known[4], 0.3, 0.6), rel=1e-5)
    assert weights[5].tolist() == [1.0] * 6, "a row without a picture"
    total = sum(part.sum().item() for part in weights[:3])
    assert total == pytest.approx(sum(lengths[:3])), "a prompt weighs as much as its tokens"


def test_completions_are_left_alike_and_weights_cut_where_it_is_asked_for():
    values = [[3.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0.5, 0.1]]
    alike = PictureDetail(temperature=None, max_weight=1.2)(tokens_of(values, [4, 4], [1, 1]))
    # ceil(0.2 * 6) = 2 of six are high: 6 * 0.5 / 2 = 1.5 is cut, 6 * 0.5 / 4 is not
    assert alike.tolist() == pytest.approx([1.2, 0.75, 0.75, 0.75, 0.75, 1.2, 1.0, 1.0])
    compared = torch.tensor([False, True, True, True, True, True])
    part = PictureDetail()(tokens_of(values[:1], [4], [1], compared))
    assert part.tolist() == pytest.approx([1.0, 0.625, 0.625, 0.625, 0.625, 2.5])


def test_on_policy_step_equals_the_eager_step_with_a_second_look(tmp_path):
    """Two completions of each prompt in a micro-batch; pictures of one, of two, and of none."""
    student, processor = tiny("qwen3_vl")
    teacher = tiny("qwen3_vl", "teacher")[0]
    before, rows = deepcopy(student), tiny_rows(3, images="mixed")
    recorder = GradientRecorder()
    fields = {"num_generations": 2, "per_device_train_batch_size": 6, "lmbda": 1.0} | DETAIL
    trainer = make_trainer(tmp_path, rows, student=student, callbacks=[recorder], **fields)
    sampled = record_completions(trainer, "student")
    trainer.train()
    looks = deepcopy(teacher).double()
    rows = [row for row in rows for _ in range(2)]
    with torch.no_grad():
        found = [
            advantage_of(looks, processor, row, ids).tolist()
            for row, ids in zip(rows, sampled, strict=True)
        ]
    # the formula has a test of its own
    places = [i // 2 for i in range(6)]
    pictures = [bool(row["images"]) for row in rows]
    parts = PictureDetail()(tokens_of(found, places, pictures)).split([len(ids) for ids in sampled])
    assert any(part.max() > 1.5 for part in parts), "the teacher sees the difference"
    expected, gradients = eager_step(
        before, teacher, processor, rows, sampled, token_weights=lambda place, *_: parts[place]
    )
    assert losses_of(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert_equal_gradients(recorder.gradients, gradients, 1e-4)


def test_across_families_a_group_has_the_advantage_of_its_bytes(tmp_path):
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    rows = rows_of("lfm2_vl")[:2]
    parts = off_policy_parts(student, teacher, rows)
    looks, places = deepcopy(teacher.model).double(), iter(rows)

    def of_groups(student_logits, teacher_logits, ids, groups):
        row = next(places)
        with torch.no_grad():
            logs = [
                scored_logits(looks, prompt_inputs(teacher.processor, view), ids[1])
                for view in (row, coarse(row))
            ]
        gains = logs[0].log_softmax(-1) - logs[1].log_softmax(-1)
        gains = gains[torch.arange(len(ids[1])), ids[1]]
        advantage, members = torch.zeros(len(ids[0])), {}
        for group in range(groups.num_groups):
            own, others = (
                [int(base[group]), *scalars[owners == group].tolist()]
                for base, _, scalars, _, owners in groups.sides
            )
            members[group] = own
            advantage[own] = (gains[others].sum() / len(own)).clamp_min(0).float()
        compared = sorted(place for own in members.values() for place in own)
        weights = dict(zip(compared, weights_of_one(advantage[compared].tolist()), strict=True))
        return torch.tensor(
            [sum(weights[place] for place in own) / len(own) for own in members.values()]
        )

    eager = {"unit_weights": of_groups}
    assert_step_is_eager(tmp_path, (student, teacher), rows, parts, eager, **DETAIL)


def test_the_teacher_looks_twice_at_pictures_alone(tmp_path):
    rows = [row for row in tiny_rows(6, images="mixed") if not row["images"]]
    trainer = make_trainer(tmp_path, [*tiny_rows(2, images=1), *rows], **DETAIL)
    batches = [
        trainer.data_collator([trainer.train_dataset[i] for i in pair]) for pair in ((0, 1), (2, 3))
    ]
    seen = [trainer.objective.prepare(batch, lambda tensor: tensor) for batch in batches]
    assert seen[1].without_detail is None
    for name, tensor in seen[0].teacher.tensors.items():
        is_equal = torch.equal(tensor, seen[0].without_detail.tensors[name])
        assert is_equal == (name != "pixel_values"), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"token_weighting_kwargs": {"high_fraction": 0}},
            r"of picture_detail must be in \(0, 1\]",
        ),
        ({"token_weighting_kwargs": {"temperature": -1}}, "must be positive, or None, got -1; the"),
        ({"token_weighting_kwargs": {"strength": 1}}, "got strength=1; they are high_fraction, hi"),
        ({"token_weighting_kwargs": {"scale": None}}, "must hold numbers of picture_detail, got {"),
        ({"token_weighting_kwargs": {"scale": "0.1"}}, "got scale='0.1'; they are high_fraction"),
        ({"teacher_cache": "there", "lmbda": 0}, "looks at pictures without detail too, got teach"),
        (
            {"num_generations": 4, "per_device_train_batch_size": 2}
            | {"gradient_accumulation_steps": 4},
            "must be a multiple of num_generations .* got 2 and 4; set it, or token_weighting_kw",
        ),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GOLDConfig(output_dir=str(tmp_path), **DETAIL, **fields)


def test_an_object_is_as_good_as_its_name(tmp_path):
    args = GOLDConfig(
        output_dir=str(tmp_path),
        num_generations=4,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
    )
    detail = PictureDetail(high_weight=0.7, temperature=None)
    weighting = make_weighting(args, detail)
    assert weighting.detail == detail and weighting.settings["token_weighting"] == "picture_detail"
    assert weighting.settings["token_weighting_kwargs"]["high_weight"] == 0.7
    with pytest.raises(ValueError, match="must be a multiple of num_generations"):
        make_weighting(args, PictureDetail())
    with pytest.raises(ValueError, match="scale of picture_detail must be in"):
        make_weighting(args, PictureDetail(scale=2))


def test_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="picture_detail' needs a vision-language student"):
        make_trainer(tmp_path, tiny_rows(2), "qwen3", **DETAIL)
    with pytest.raises(ValueError, match="picture_detail' needs a vision-language student"):
        make_trainer(tmp_path, tiny_rows(2), "qwen3", token_weighting=PictureDetail())

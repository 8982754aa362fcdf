"""Weights of tokens in the loss, from a function of a micro-batch: the step equals the eager
float64 step, however the batch is split; answers that cannot be are refused.
"""

import json
import re

import pytest
import torch

from gold_trainer import GOLDConfig, ScoredTokens
from gold_trainer.survival import checkpoints
from gold_trainer.survival.resuming import check_settings, settings_of_run
from gold_trainer.weighting.picture_detail import PictureDetail
from gold_trainer.weighting.weighting import make_weighting
from support import weightings
from support.cross_cases import (
    assert_step_is_eager,
    by_position,
    make_sides,
    off_policy_parts,
    rows_of,
)
from support.eager_step import completion_of, eager_step
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import (
    GradientRecorder,
    assert_equal_gradients,
    losses_of,
    make_trainer,
    one_step,
)

GRADED = "support.weightings:graded"


def log_probs_of(logits, ids):
    return logits.log_softmax(-1)[torch.arange(len(ids)), ids]


def test_step_and_evaluation_equal_the_eager_float64_step(tmp_path):
    student, processor = tiny("qwen3_vl")
    teacher = tiny("qwen3_vl", "teacher")[0]
    rows = tiny_rows(4, images="mixed")
    completions = [completion_of("qwen3_vl", processor, row) for row in rows]

    def weights(place, student_logits, teacher_logits, ids):
        gap = (log_probs_of(teacher_logits, ids) - log_probs_of(student_logits, ids)).abs()
        even = 1.0 if place % 2 == 0 else 0.25
        return (torch.arange(len(ids)) % 3 + 1) * gap**1.5 * even + (ids == completions[0][0])

    options = {"weights": (1.0, 0.3), "token_weights": weights}
    expected, gradients = eager_step(student, teacher, processor, rows, completions, **options)
    recorder = GradientRecorder()
    trainer = make_trainer(
        tmp_path,
        rows,
        student=student,
        eval_rows=rows,
        callbacks=[recorder],
        token_weighting=weightings.by_gap,
        token_weighting_kwargs={"power": 1.5},
        crossentropy_weight=0.3,
    )
    evaluated = trainer.evaluate()
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert_equal_gradients(recorder.gradients, gradients, 1e-4)
    assert evaluated["eval_loss"] == pytest.approx(expected, rel=1e-5)
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["off_policy_loss"] == pytest.approx(expected, rel=1e-5)
    assert log["jsd_loss"] + 0.3 * log["crossentropy"] == pytest.approx(expected, rel=1e-5)
    assert log["token_weight"] == pytest.approx(evaluated["eval_token_weight"], rel=1e-5)


def test_loss_and_gradient_do_not_depend_on_the_split_into_micro_batches(tmp_path):
    """Of what the student writes; the rest of the splits is what two processes are tested with."""

    def step(size):
        fields = {"lmbda": 1.0, "per_device_train_batch_size": size, "temperature": 0.5}
        fields |= {"gradient_accumulation_steps": 4 // size, "token_weighting": GRADED}
        return one_step(tmp_path / str(size), tiny_rows(4), "qwen3", **fields)

    whole, parts = step(4), step(1)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert_equal_gradients(parts[1], whole[1])


@pytest.mark.parametrize("kind", ["hybrid", "by_position"])
def test_a_group_weighs_as_much_as_its_tokens_do_on_average(kind, tmp_path):
    """The teacher's log-probability of a group belongs to its tokens in even parts; the
    cross-entropy has no weights.
    """
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    rows = rows_of("lfm2_vl")
    parts = off_policy_parts(student, teacher, rows)
    fields = {"uld_use_hybrid_loss": True, "uld_crossentropy_weight": 0.3}
    eager = {"is_hybrid": True, "crossentropy_weight": 0.3}
    if kind == "by_position":
        fields, eager = {"use_extended_uld": False}, {}
        parts = parts[0], by_position(*parts, skips=False)

    def of_groups(student_logits, teacher_logits, ids, groups):
        own, other = (torch.tensor(side) for side in ids)
        values = log_probs_of(student_logits, own).abs() + torch.arange(len(own))
        of_teacher = log_probs_of(teacher_logits, other)
        result = []
        for group in range(groups.num_groups):
            members, others = (
                [int(base[group]), *scalars[owners == group].tolist()]
                for base, _, scalars, _, owners in groups.sides
            )
            share = of_teacher[others].sum().abs() / len(members)
            result.append((values[members] + share).mean())
        return torch.stack(result)

    def weigh(tokens):
        own = tokens.student_log_probs().abs() + tokens.positions
        own = own + tokens.teacher_log_probs().abs()
        return torch.where(tokens.is_compared, own, 1e6)  # of which nothing comes

    fields["token_weighting"] = weigh
    eager["unit_weights"] = of_groups
    trainer = assert_step_is_eager(tmp_path, (student, teacher), rows, parts, eager, **fields)
    assert trainer.state.log_history[0]["token_weight"] > 1


def shorter(tokens):
    return torch.ones(len(tokens.ids) - 1)


def negative(tokens):
    return torch.where(tokens.positions == 2, -0.5, 1.0)


def undefined(tokens):
    return torch.where(tokens.completions == 1, torch.nan, 1.0)


def listed(tokens):
    return [1.0] * len(tokens.ids)


def found_later(tokens):  # as by a device
    tokens.batch.bad_weights = torch.tensor(True)
    return torch.ones_like(tokens.ids)


def test_answers_that_cannot_be_weights_end_the_run_before_the_step(tmp_path):
    """Weights on a device are looked at with the gradient's norm, also where on_nonfinite skips."""
    fields = {"on_nonfinite": "skip", "per_device_train_batch_size": 2, "token_weighting": shorter}
    trainer = make_trainer(tmp_path, tiny_rows(2), "qwen3", **fields)
    for function, message in (
        (shorter, r"token_weighting: shorter must return a real tensor of shape \(N,\) = \(\d+,\)"),
        (listed, r"token_weighting: listed must return a real tensor .* got list; weigh every"),
        (negative, r"row 0: token_weighting: negative must .*, got -0.5 for token 2 of the compl"),
        (undefined, r"row 1: token_weighting: undefined must return weights .*, got nan for token"),
        (found_later, r"token_weighting must return weights .* in step 1, dataset rows 0, 1; the"),
    ):
        trainer.objective.weighting = make_weighting(trainer.args, function)
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert not trainer.state.global_step


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_weighting": "picture_details"}, "must be one of picture_detail, or module:functi"),
        ({"token_weighting": "nowhere:f"}, r"a module that can be imported, got 'nowhere:f' \(Mod"),
        ({"token_weighting": "support.weightings:f"}, "must name a function, .* has none"),
        ({"token_weighting": "support.weightings:UNUSABLE"}, "must name a function, .* has int"),
        ({"token_weighting": 3}, "token_weighting must be None or text, got 3"),
        (
            {"token_weighting": lambda tokens: tokens},
            r"by its name, got .*lambda>; pass it to GOLD",
        ),
        ({"token_weighting_kwargs": "[1]"}, "token_weighting_kwargs must be a dict of numbers"),
        (
            {"token_weighting": GRADED, "distillation_weight": 0, "crossentropy_weight": 1},
            "weighs the loss between teacher and student, got .* and distillation_weight=0; leave",
        ),
        (
            {"token_weighting": GRADED, "use_uld_loss": True, "uld_distillation_weight": 0}
            | {"uld_crossentropy_weight": 1},
            "and uld_distillation_weight=0; leave token_weighting out",
        ),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GOLDConfig(output_dir=str(tmp_path), **fields)


def test_a_function_comes_from_a_module_by_name_or_as_an_argument(tmp_path, monkeypatch):
    """The config stays as it is: checkpoints have the name of what was given."""
    (tmp_path / "own_weights_of_tokens.py").write_text("def f(tokens, most):\n    return most\n")
    monkeypatch.chdir(tmp_path)
    fields = {"output_dir": str(tmp_path), "token_weighting_kwargs": '{"most": 2}'}
    args = GOLDConfig(**fields, token_weighting="own_weights_of_tokens:f")
    assert make_weighting(args).function(None, **make_weighting(args).kwargs) == 2
    named = GOLDConfig(**fields, token_weighting=weightings.graded)
    assert named.token_weighting == GRADED
    plain = GOLDConfig(**fields)
    for given, name in (
        (weightings.graded, GRADED),
        (lambda tokens, most: most, "<lambda>"),
        (GRADED, GRADED),
    ):
        weighting = make_weighting(plain, given)
        settings = settings_of_run(plain, weighting)
        assert settings["token_weighting"].endswith(name)
        assert settings["token_weighting_kwargs"] == {"most": 2}
        assert plain.token_weighting is None
    for given, config, message in (
        (None, plain, "token_weighting_kwargs must be None without token_weighting"),
        (3, plain, "must be a function of ScoredTokens, or its name, got int"),
        (lambda tokens: tokens, named, r"must be given once, got .*<lambda> and .*graded"),
        ("", plain, "token_weighting must be one of picture_detail, or module:function .* got ''"),
        ("picture_detail", named, r"must be given once, got picture_detail and .*graded"),
        (
            PictureDetail(),
            plain,
            r"token_weighting_kwargs must be None beside PictureDetail\(.*own",
        ),
        (shorter, plain, r"must be what shorter takes beside the tokens, nothing, got {'most': 2}"),
        (weightings.unsure, plain, r"nothing, got {'most': 2} \(got an unexpected keyword argum"),
    ):
        with pytest.raises(ValueError, match=message):
            make_weighting(config, given)
    with pytest.raises(
        ValueError, match=r"beside the tokens, most, got {'mots': 1.0} .* mean most"
    ):
        GOLDConfig(str(tmp_path), token_weighting=GRADED, token_weighting_kwargs={"mots": 1.0})


def test_a_run_that_is_resumed_without_its_weights_says_so(tmp_path, caplog):
    """Also without those of a function that has no name."""
    args = GOLDConfig(output_dir=str(tmp_path))
    weighting = make_weighting(args, lambda tokens: tokens)
    mark = {"settings": settings_of_run(args, weighting), "files": {}}
    (tmp_path / checkpoints.MARK).write_text(json.dumps(mark))
    check_settings(tmp_path, args, weighting)
    assert not caplog.text
    check_settings(tmp_path, args)
    assert re.search(r"other settings: token_weighting .*<lambda> -> None", caplog.text)


def test_a_cache_of_means_has_no_log_probabilities_of_the_teacher():
    tokens = ScoredTokens(None, None, None, teacher=None)
    for ask in (tokens.teacher_log_probs, tokens.teacher_log_probs_without_detail):
        with pytest.raises(
            ValueError, match="the teacher's log-probabilities must be known, got a"
        ):
            ask()

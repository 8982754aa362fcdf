"""Fields of the loss: any loss of gold_kernels.losses by name, its numbers, its memory. What cannot
be is named, and nothing is ignored.
"""

import pytest
from transformers import HfArgumentParser

from gold_kernels.losses import LOSSES
from gold_trainer import GOLDConfig

DEFAULTS = {
    "loss": "jsd",
    "loss_kwargs": None,
    "beta": 0.5,
    "loss_top_k": 0,
    "loss_temperature": 1.0,
    "loss_teacher_temperature": None,
    "distillation_weight": 1.0,
    "crossentropy_weight": 0.0,
    "chunk_size": None,
    "loss_budget_mib": None,
    "logits_dtype": "float32",
    "loss_backend": None,
}


def test_defaults(tmp_path):
    config = GOLDConfig(output_dir=str(tmp_path))
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.loss_numbers == {"beta": 0.5, "temperature": 1.0}


@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_of_the_library_is_taken_by_name(loss, tmp_path):
    config = GOLDConfig(output_dir=str(tmp_path), loss=loss)
    assert LOSSES[loss](**config.loss_numbers) == LOSSES[loss]()


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({"beta": 0.2, "loss_temperature": 2.0}, {"beta": 0.2, "temperature": 2.0}),
        ({"loss_teacher_temperature": 0.5}, {"beta": 0.5, "temperature": (1.0, 0.5)}),
        ({"loss": "skew_kl", "loss_kwargs": {"alpha": 0.3}}, {"alpha": 0.3}),
        ({"loss": "skew_kl", "loss_kwargs": '{"alpha": 0.3}'}, {"alpha": 0.3}),
        ({"loss": "total_variation", "loss_kwargs": {}}, {}),
    ],
)
def test_fields_and_loss_kwargs_are_the_numbers_of_the_loss(fields, numbers, tmp_path):
    actual = GOLDConfig(output_dir=str(tmp_path), **fields).loss_numbers
    assert {name: actual[name] for name in numbers} == numbers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"loss": "jds"},
            f"loss must be one of {', '.join(LOSSES)}, got 'jds'; did you mean jsd",
        ),
        ({"loss": "Skew-KL"}, "loss must be one of jsd, .*got 'Skew-KL'; did you mean skew_kl"),
        ({"loss": "uld"}, "loss must be one of jsd, .*got 'uld'; set use_uld_loss=True for the"),
        (
            {"loss": "skew_kl", "loss_kwargs": {"alhpa": 0.2}},
            "loss_kwargs must hold numbers of loss='skew_kl', got alhpa=0.2; they are alpha",
        ),
        (
            {"loss_kwargs": {"alpha": 0.2}},
            "loss_kwargs must hold numbers of loss='jsd', got alpha=0.2; they are none",
        ),
        (
            {"loss_kwargs": {"beta": 0.2}},
            "loss_kwargs must hold numbers without a field of their own, got beta=0.2; set beta",
        ),
        ({"loss_kwargs": {"temperature": 2.0}}, "loss_kwargs .* got temperature=2.0; set loss_tem"),
        ({"loss": "skew_kl", "loss_kwargs": {"alpha": 1.5}}, "alpha must be .*got 1.5"),
        (
            {"loss": "skew_kl", "loss_kwargs": {"alpha": "high"}},
            "loss_kwargs must hold numbers, got {'alpha': 'high'} .*without quotes",
        ),
        ({"loss_kwargs": "alpha"}, "loss_kwargs must be a dict of numbers, got 'alpha'"),
        ({"loss_kwargs": "{alpha}"}, "loss_kwargs must be a dict of .*, got '{alpha}'"),
        ({"loss_kwargs": [0.2]}, r"loss_kwargs must be a dict of numbers, got \[0.2\]"),
        (
            {"loss": "skew_kl", "beta": 0.2},
            "beta must be left out with loss='skew_kl', which has no beta, got 0.2; its numbers",
        ),
        ({"loss": "total_variation", "beta": 0.2}, "beta must be left out with loss='total_var"),
        (
            {"loss_teacher_temperature": 0.0},
            "loss_teacher_temperature must be None or positive and finite, got 0.0; 1.0 leaves",
        ),
        ({"distillation_weight": -1.0}, "distillation_weight must be finite and not negative, got"),
        ({"crossentropy_weight": float("nan")}, "crossentropy_weight must be finite and not neg"),
        (
            {"distillation_weight": 0.0},
            "distillation_weight or crossentropy_weight must be above 0, got 0 for both; nothing",
        ),
        (
            {"distillation_weight": 0.0, "crossentropy_weight": 1.0, "lmbda": 1.0},
            "distillation_weight must be above 0 where .* got 0 and lmbda=1.0; .* lower lmbda",
        ),
        ({"loss_budget_mib": 0.0}, "loss_budget_mib must be None or finite and at least 0.001"),
        ({"loss_budget_mib": float("inf")}, "loss_budget_mib must be None or finite .*got inf"),
        ({"logits_dtype": "float16"}, "logits_dtype must be 'float32' or 'bfloat16', got 'float16"),
        ({"loss_backend": "cuda"}, "loss_backend must be None, 'triton' or 'torch', got 'cuda'"),
    ],
)
def test_impossible_value_is_named(fields, message, tmp_path):
    with pytest.raises(ValueError, match=f"^GOLDConfig: {message}"):
        GOLDConfig(output_dir=str(tmp_path / "run"), **fields)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"crossentropy_weight": 0.5}, "set uld_crossentropy_weight"),
        ({"distillation_weight": 0.5}, "set uld_distillation_weight"),
        ({"loss_teacher_temperature": 2.0}, "set uld_student_temperature and uld_teacher_temp"),
        ({"loss": "total_variation"}, "set uld_use_hybrid_loss, or leave it out"),
        ({"loss_kwargs": {"alpha": 0.1}}, "set the uld_ fields"),
    ],
)
def test_field_of_one_vocabulary_is_refused_across_tokenizers(fields, remedy, tmp_path):
    (name,) = fields
    message = f"^GOLDConfig: {name} must be .* with use_uld_loss, got .*; {remedy}"
    with pytest.raises(ValueError, match=message):
        GOLDConfig(output_dir=str(tmp_path), use_uld_loss=True, **fields)


def test_memory_and_backend_hold_for_the_loss_across_tokenizers_too(tmp_path):
    fields = {"chunk_size": 8, "loss_budget_mib": 64.0, "logits_dtype": "bfloat16"}
    fields |= {"loss_backend": "torch", "beta": 0.0}
    config = GOLDConfig(output_dir=str(tmp_path), use_uld_loss=True, **fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_command_line_gives_numbers_and_refuses_other_choices(tmp_path, capsys):
    parser = HfArgumentParser([GOLDConfig])
    flags = [f"--output_dir={tmp_path}", "--loss=skew_kl", '--loss_kwargs={"alpha": 0.2}']
    (config,) = parser.parse_args_into_dataclasses(
        [*flags, "--loss_budget_mib=256", "--logits_dtype=bfloat16", "--crossentropy_weight=0.1"]
    )
    assert config.loss_numbers["alpha"] == 0.2
    assert (config.loss_budget_mib, config.crossentropy_weight) == (256.0, 0.1)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses([*flags, "--logits_dtype=float16"])
    assert "bfloat16" in capsys.readouterr().err

"""Fields of the loss across tokenizers: what cannot be is named, and nothing is ignored."""

import pytest
from transformers import HfArgumentParser

from gold_trainer import GOLDConfig

# Ours where TRL's default is a defect: merging by the first token, no distilled end of a turn.
DEFAULTS = {
    "use_uld_loss": False,
    "uld_loss_type": "uld",
    "uld_group_temperature": 100.0,
    "teacher_tokenizer_name_or_path": None,
    "use_extended_uld": True,
    "uld_token_merge_strategy": "bayesian",
    "uld_use_hybrid_loss": False,
    "uld_relaxed_overlap": False,
    "uld_hybrid_matched_weight": None,
    "uld_hybrid_unmatched_weight": None,
    "uld_crossentropy_weight": 0.0,
    "uld_distillation_weight": 1.0,
    "uld_student_temperature": 1.0,
    "uld_teacher_temperature": 1.0,
    "uld_skip_student_eos": False,
    "uld_skip_teacher_eos": False,
}
TRL = {
    "uld_token_merge_strategy": "observed",
    "uld_skip_student_eos": True,
    "uld_skip_teacher_eos": True,
}


def test_defaults(tmp_path):
    config = GOLDConfig(output_dir=str(tmp_path))
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.has_end_of_turn
    assert GOLDConfig(output_dir=str(tmp_path), use_uld_loss=True).uld_distillation_weight == 1


@pytest.mark.parametrize(
    "fields",
    [
        TRL,
        {"uld_distillation_weight": 0.0, "uld_crossentropy_weight": 1.0},
        {
            "uld_use_hybrid_loss": True,
            "uld_hybrid_matched_weight": 0.0,
            "uld_hybrid_unmatched_weight": 1.0,
        },
        {"use_extended_uld": False, "uld_student_temperature": 0.5},
        {"uld_loss_type": "chunk_likelihood", "uld_group_temperature": 1.0},
        {"uld_loss_type": "projected_jsd", "uld_crossentropy_weight": 1.0},
        {"uld_use_hybrid_loss": True, "uld_relaxed_overlap": True},
    ],
)
def test_possible_values_are_kept(fields, tmp_path):
    config = GOLDConfig(output_dir=str(tmp_path), use_uld_loss=True, **fields)
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.has_end_of_turn == ("uld_skip_student_eos" not in fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"uld_token_merge_strategy": "first"},
            "uld_token_merge_strategy must be 'bayesian' or 'observed', got 'first'",
        ),
        ({"uld_loss_type": "alm"}, "uld_loss_type must be .*'projected_jsd', got 'alm'"),
        ({"uld_group_temperature": 1.0}, "uld_group_temperature is a number of .* with 'uld'"),
        ({"uld_relaxed_overlap": True}, "uld_relaxed_overlap .* got True .*; set uld_use_hybrid"),
        (
            {"uld_loss_type": "projected_jsd", "uld_use_hybrid_loss": True},
            "uld_use_hybrid_loss must be False with uld_loss_type='projected_jsd', .* got True",
        ),
        (
            {"uld_loss_type": "chunk_likelihood", "uld_group_temperature": 0.0},
            "uld_group_temperature must be positive and finite, got 0.0; 1.0 compares",
        ),
        (
            {"uld_loss_type": "chunk_likelihood", "uld_use_hybrid_loss": True},
            "uld_use_hybrid_loss must be False with uld_loss_type='chunk_likelihood', .* got True",
        ),
        (
            {"uld_loss_type": "chunk_likelihood", "uld_token_merge_strategy": "observed"},
            "uld_token_merge_strategy must be 'bayesian' with .*, got 'observed'; leave it out",
        ),
        (
            {"uld_loss_type": "chunk_likelihood", "use_extended_uld": False},
            "use_extended_uld must be True with .*, got False; leave it out",
        ),
        (
            {"uld_student_temperature": 0.0},
            "uld_student_temperature must be positive and finite, got 0.0; 1.0 leaves",
        ),
        ({"uld_teacher_temperature": float("inf")}, "uld_teacher_temperature must be positive"),
        (
            {"uld_crossentropy_weight": -1.0},
            "uld_crossentropy_weight must be finite and not negative, got -1.0; 0 leaves",
        ),
        ({"uld_distillation_weight": float("nan")}, "uld_distillation_weight must be finite"),
        (
            {"uld_distillation_weight": 0.0},
            "uld_distillation_weight or uld_crossentropy_weight must be above 0, got 0 for both",
        ),
        (
            {"uld_distillation_weight": 0.0, "uld_crossentropy_weight": 1.0, "lmbda": 1.0},
            "uld_distillation_weight must be above 0 where .* got 0 and lmbda=1.0; .* lower lmbda",
        ),
        (
            {"uld_use_hybrid_loss": True, "uld_hybrid_matched_weight": 0.5},
            "uld_hybrid_matched_weight and uld_hybrid_unmatched_weight must be given both or not "
            "at all, got 0.5 and None",
        ),
        (
            {"uld_hybrid_matched_weight": 0.5, "uld_hybrid_unmatched_weight": 0.5},
            "uld_hybrid_matched_weight and .* got 0.5 and 0.5; set uld_use_hybrid_loss=True",
        ),
        (
            {
                "uld_use_hybrid_loss": True,
                "uld_hybrid_matched_weight": 0.0,
                "uld_hybrid_unmatched_weight": 0.0,
            },
            "uld_hybrid_matched_weight or uld_hybrid_unmatched_weight must be above 0, got 0",
        ),
        (
            {"loss_temperature": 2.0},
            "loss_temperature must be 1.0 with use_uld_loss, got 2.0; set uld_student_temperature",
        ),
    ],
)
def test_impossible_value_is_named(fields, message, tmp_path):
    with pytest.raises(ValueError, match=f"^GOLDConfig: {message}"):
        GOLDConfig(output_dir=str(tmp_path), use_uld_loss=True, **fields)


@pytest.mark.parametrize(
    "fields", [{name: value} for name, value in TRL.items()] + [{"use_extended_uld": False}]
)
def test_field_of_the_other_loss_is_not_ignored(fields, tmp_path):
    (name,) = fields
    with pytest.raises(
        ValueError, match=f"^GOLDConfig: {name} belongs to the loss across .*set use_uld_loss=True"
    ):
        GOLDConfig(output_dir=str(tmp_path), **fields)


def test_command_line_names_the_choices(tmp_path, capsys):
    parser = HfArgumentParser([GOLDConfig])
    flags = [f"--output_dir={tmp_path}", "--use_uld_loss", "--uld_token_merge_strategy"]
    (config,) = parser.parse_args_into_dataclasses([*flags, "observed"])
    assert config.uld_token_merge_strategy == "observed"
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses([*flags, "first"])
    assert "bayesian" in capsys.readouterr().err


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_either_side_leaves_the_end_of_turn_out(side, tmp_path):
    fields = {"use_uld_loss": True, f"uld_skip_{side}_eos": True}
    assert not GOLDConfig(output_dir=str(tmp_path), **fields).has_end_of_turn

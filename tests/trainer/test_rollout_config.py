"""Fields of sampling: what is refused, in which words, before anything is loaded."""

import pytest

from gold_trainer import GOLDConfig
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_p": 1.5}, "min_p must be None or in [0, 1], got 1.5; None turns it off"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive and finite, got 0.0"),
        ({"rollout_cache_gib": 0}, "rollout_cache_gib must be None or positive and finite, got 0"),
        (
            {"rollout_cache_gib": 2.0, "lmbda": 0.0},
            "rollout_cache_gib must be None where no completion is written in this process, got "
            "2.0 with lmbda=0; leave it out",
        ),
        (
            {"rollout_cache_gib": 2.0, "use_vllm": True},
            "rollout_cache_gib must be None where no completion is written in this process, got "
            "2.0 with use_vllm=True; leave it out",
        ),
        ({"rollout_compile": False, "use_vllm": True}, "rollout_compile must be None where no co"),
        ({"rollout_compile": True, "lmbda": 0.0}, "rollout_compile must be None where no complet"),
        ({"stop_strings": [""]}, "stop_strings must be texts, got ['']; the empty one would end"),
        ({"stop_strings": "."}, "stop_strings must be a list of texts, got '.'; write ["),
        ({"generation_kwargs": 3}, "generation_kwargs must be a dict of arguments"),
        (
            {"generation_kwargs": {"top_p": 0.5}},
            "generation_kwargs must hold what has no field, got 'top_p'; set top_p instead",
        ),
        (
            {"generation_kwargs": '{"max_tokens": 5}'},
            "must hold what has no field, got 'max_tokens'; set max_completion_length instead",
        ),
        (
            {"generation_kwargs": {"num_beams": 4}},
            "generation_kwargs must leave num_beams to the trainer, got 4; leave it out",
        ),
    ],
)
def test_a_field_that_cannot_be_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError) as error:
        GOLDConfig(output_dir=str(tmp_path), use_cpu=True, **fields)
    assert message in str(error.value)


@pytest.mark.parametrize("who", [{"lmbda": 0.0}, {"use_vllm": True}, {"lmbda": 0.5}])
def test_fields_of_the_local_writer_stay_where_somebody_writes_here(who, tmp_path):
    for is_asked in {True, who.get("lmbda") != 0.5}:
        fields = {"rollout_cache_gib": 2.0, "rollout_compile": True, "seq_kd": is_asked}
        GOLDConfig(output_dir=str(tmp_path), use_cpu=True, **who, **fields)


@pytest.mark.parametrize(
    ("name", "meant"), [("no_repeat_ngram", "no_repeat_ngram_size"), ("typical_p", None)]
)
def test_arguments_that_generate_would_not_apply_are_refused(name, meant, tmp_path):
    message = (
        rf"generation_kwargs must hold arguments of generate\(\) .* got '{name}'; they are min_"
    )
    with pytest.raises(ValueError, match=message) as error:
        make_trainer(tmp_path, tiny_rows(1), "qwen3", generation_kwargs={name: 2})
    assert meant is None or f"did you mean {meant}?" in str(error.value)


def test_sampling_is_that_of_trl_unless_it_is_set(tmp_path):
    args = GOLDConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (args.temperature, args.top_p, args.top_k) == (0.9, 0.95, 0)
    assert (args.min_p, args.repetition_penalty, args.stop_strings) == (None, 1.0, None)
    assert args.generation_kwargs is None

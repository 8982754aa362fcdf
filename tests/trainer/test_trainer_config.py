"""GOLDConfig: TRL's defaults, and one message for each field that cannot be."""

import pytest
from transformers import HfArgumentParser

from gold_trainer import GOLDConfig

DEFAULTS = {
    "learning_rate": 1e-7,
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 0,
    "lmbda": 0.5,
    "beta": 0.5,
    "loss_temperature": 1.0,
    "max_completion_length": 128,
    "max_length": 2048,
    "teacher_model_name_or_path": None,
    "teacher_model_revision": None,
    "teacher_model_init_kwargs": None,
    "model_init_kwargs": None,
    "disable_dropout": True,
    "seq_kd": False,
    "log_completions": False,
    "log_completions_steps": 100,
    "num_completions_to_print": None,
    "num_generations": 1,
    "generation_batch_size": 8,  # None, computed: 8 rows of one micro-batch
    "chunk_size": None,
    "use_uld_loss": False,
    "remove_unused_columns": False,
}


def test_defaults_are_those_that_trl_users_know(tmp_path):
    config = GOLDConfig(output_dir=str(tmp_path))
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lmbda": 1.5}, r"lmbda must be in \[0, 1\], got 1.5; 0 is off-policy"),
        ({"lmbda": -0.1}, r"lmbda must be in \[0, 1\], got -0.1"),
        ({"beta": 2.0}, r"beta must be in \[0, 1\], got 2.0; 0 is forward KL"),
        ({"beta": float("nan")}, r"beta must be in \[0, 1\], got nan"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0; 1.0 leaves"),
        ({"loss_temperature": -1.0}, "loss_temperature must be positive and finite, got -1.0"),
        ({"loss_temperature": float("inf")}, "loss_temperature must be positive and finite"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0; 1.0 turns it off"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"top_k": -1}, "top_k must be at least 0, got -1; 0 turns it off"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1, got 0"),
        (
            {"max_completion_length": 64, "max_length": 64},
            "max_completion_length must be below max_length, got 64 and 64; raise max_length",
        ),
        ({"chunk_size": 0}, "chunk_size must be None or at least 1, got 0"),
        ({"log_completions_steps": 0}, "log_completions_steps must be at least 1, got 0"),
        ({"num_completions_to_print": 0}, "num_completions_to_print must be None or at least 1"),
        (
            {"seq_kd": True, "lmbda": 1.0},
            "seq_kd must be False where every micro-batch is on-policy, got True .* lower lmbda",
        ),
        (
            {"num_generations": 0},
            "num_generations must be at least 1, got 0; 1 is one",
        ),
        (
            {"num_generations": 3, "gradient_accumulation_steps": 2},
            r"num_generations must divide per_device_train_batch_size \* "
            r"gradient_accumulation_steps = 8 \* 2, got 3; set gradient_accumulation_steps to a",
        ),
        (
            {"num_generations": 2, "generation_batch_size": 8},
            r"generation_batch_size \* num_generations must be per_device_train_batch_size \* "
            r"gradient_accumulation_steps, got 8 \* 2 and 8 \* 1; set generation_batch_size=4, or",
        ),
        ({"generation_batch_size": 0}, "generation_batch_size must be None or at least 1, got 0"),
        (
            {"num_generations": 2, "auto_find_batch_size": True},
            "auto_find_batch_size must be False with num_generations above 1, got True and num_gen",
        ),
        (
            {"teacher_model_init_kwargs": "bfloat16"},
            "teacher_model_init_kwargs must be a dict of from_pretrained's arguments, got",
        ),
        ({"model_init_kwargs": ["dtype"]}, "model_init_kwargs must be a dict"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False, got True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0, got 0.1"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy must be 'random' or 'sequential', got 'group_by_length'",
        ),
        (
            {"include_num_input_tokens_seen": "all"},
            "include_num_input_tokens_seen must be 'no', got 'all'",
        ),
    ],
)
def test_impossible_value_is_named_and_nothing_is_written(fields, message, tmp_path):
    with pytest.raises(ValueError, match=f"^GOLDConfig: {message}"):
        GOLDConfig(output_dir=str(tmp_path / "run"), **fields)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"lmbda": 0.0, "beta": 1.0, "top_p": 1.0},
        {"lmbda": 1.0, "beta": 0.0, "top_k": 50},
        {"max_length": None, "max_completion_length": 10**6},
        {"max_completion_length": 63, "max_length": 64, "chunk_size": 1},
        {"seq_kd": True, "lmbda": 0.9},
        {"num_generations": 16, "gradient_accumulation_steps": 2, "generation_batch_size": 1},
        {"gradient_accumulation_steps": 2, "generation_batch_size": 16},
    ],
)
def test_values_at_the_limits_are_allowed(fields, tmp_path):
    config = GOLDConfig(output_dir=str(tmp_path), **fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_command_line_gives_numbers_and_dicts(tmp_path):
    parser = HfArgumentParser([GOLDConfig])
    kwargs = '{"dtype": "bfloat16", "trust_remote_code": true}'
    (config,) = parser.parse_args_into_dataclasses(
        [f"--output_dir={tmp_path}", "--lmbda=0.25", f"--teacher_model_init_kwargs={kwargs}"]
    )
    assert config.lmbda == 0.25
    assert config.teacher_model_init_kwargs == {"dtype": "bfloat16", "trust_remote_code": True}


@pytest.mark.parametrize("backend", ["INDUCTOR", "aot_eager", "no", "NO", ""])
def test_a_launcher_that_compiles_the_whole_model_is_refused(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    if backend.lower() in ("no", ""):
        assert not GOLDConfig(output_dir=str(tmp_path)).torch_compile
        return
    with pytest.raises(
        ValueError, match=f"dynamo_backend of accelerate must be 'no', got '{backend}"
    ):
        GOLDConfig(output_dir=str(tmp_path))

"""Flags and keys of a file that would do nothing, or that mean something else than they say."""

import os
import re

import pytest

from gold_trainer import GOLDConfig
from gold_trainer.command_line import (
    _lora_config,
    named_fields,
    parse_arguments,
    read_run,
    refuse_idle,
)
from gold_trainer.data.data_files import DataArguments, load_rows

CPU = ("--use_cpu", "--report_to", "none")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--lora_r", "8"],
            "lora_r does nothing while use_peft is not set: set use_peft, or leave",
        ),
        (["--lora-target-modules", "q_proj"], "lora_target_modules does nothing while use_peft"),
        (["--eval_steps=5"], "eval_steps does nothing while eval_strategy is not set"),
        (["--do_eval"], "do_eval does nothing while eval_strategy is not set"),
        (["--dataset_test_split", "val"], "dataset_test_split does nothing while eval_strategy"),
        (["--hub_model_id", "a/b"], "hub_model_id does nothing while push_to_hub is not set"),
        (
            ["--log_completions_steps", "2"],
            "log_completions_steps does nothing while log_completions is not",
        ),
        (["--do_predict"], "do_predict is True, but this command trains"),
        (["--do_train", "false"], "do_train is False, but this command trains"),
    ],
)
def test_a_flag_that_does_nothing_is_refused_with_the_one_that_is_missing(flags, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        refuse_idle(flags, parse_arguments([*CPU, *flags])[2])


def test_a_key_of_a_file_that_does_nothing_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("lora_r: 8\neval_steps: null\nuse_cpu: true\n")
    argv = [str(tmp_path / "c.yaml")]
    with pytest.raises(ValueError, match=r"^lora_r does nothing while use_peft is not set"):
        read_run(argv)
    refuse_idle([*argv, "--use_peft", "no"], parse_arguments(argv)[2])


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_peft", "--lora_r", "8"],
        ["--lora_r", "8", "--use_peft", "false"],  # of a recipe, and turned off
        ["--eval_steps", "5", "--eval_strategy", "no"],
        ["--eval_on_start", "--dataset_test_split", "val"],
        ["--do_train"],
    ],
)
def test_a_flag_whose_switch_is_on_or_was_turned_off_passes(flags):
    refuse_idle(flags, parse_arguments([*CPU, *flags])[2])


@pytest.mark.parametrize("number", ["1:30", "010", "2026-11-30", "0o17", "12:30:45.5"])
def test_words_that_yaml_1_1_takes_for_numbers_and_dates_stay_words(number, tmp_path):
    (tmp_path / "c.yaml").write_text(
        f"dataset_config: {number}\nchat_template_kwargs: {{day: {number}}}\nseed: 010\n"
        "max_steps: 1_000\nweight_decay: 0.5\nmax_grad_norm: 2.\n"
    )
    _, data, config = parse_arguments([str(tmp_path / "c.yaml"), *CPU])
    assert data.dataset_config == config.chat_template_kwargs["day"] == number
    assert (config.seed, config.max_steps) == (10, 1000)
    assert (config.weight_decay, config.max_grad_norm) == (0.5, 2.0)


def test_a_home_is_read_in_a_file_and_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "c.yaml").write_text("model_name_or_path: ~/student\npicture_folder: ~/pictures\n")
    argv = [str(tmp_path / "c.yaml"), "--teacher_model_name_or_path=~/teacher", *CPU]
    argv += ["--stop_strings", "~/", "--run_name=~/a"]
    model, _, config = parse_arguments(argv)
    names = model.model_name_or_path, config.teacher_model_name_or_path, config.picture_folder
    assert names == tuple(str(tmp_path / name) for name in ("student", "teacher", "pictures"))
    assert (config.stop_strings, config.run_name) == (["~/"], "~/a"), "they are no paths"


@pytest.mark.parametrize("home", ["~", "$HOME", "${HOME}"])
def test_variables_in_paths_are_read_in_a_file_and_in_python(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text(
        f"output_dir: {home}/run\nmodel_name_or_path: {home}/student\ndataset_name: {home}/rows\n"
        f"picture_folder: {home}/pictures\nteacher_models:\n  math: {home}/math\n  code: a/b\n"
        f"model_init_kwargs:\n  cache_dir: {home}/hub\nrun_name: $HOME\n"
    )
    (tmp_path / "pictures").mkdir()
    (tmp_path / "a.json").write_text('{"use_seedable_sampler": false}')
    argv = [str(tmp_path / "c.yaml"), *CPU, "--accelerator_config", f"{home}/a.json"]
    model, data, config = parse_arguments(argv)
    assert config.output_dir == str(tmp_path / "run")
    assert model.model_name_or_path == str(tmp_path / "student")
    assert data.dataset_name == str(tmp_path / "rows")
    assert config.picture_folder == str(tmp_path / "pictures")
    assert config.teacher_models == {"math": str(tmp_path / "math"), "code": "a/b"}
    assert config.model_init_kwargs == {"cache_dir": str(tmp_path / "hub")}
    assert config.run_name == "$HOME"  # no path
    assert config.accelerator_config.use_seedable_sampler is False
    assert GOLDConfig(output_dir=f"{home}/run", use_cpu=True).output_dir == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("path", "left"),
    [("$NOWHERE_1/x", "$NOWHERE_1"), ("/a/${oc.env:HOME}", "${oc.env:HOME}"), ("$(pwd)", "$(pwd)")],
)
def test_a_variable_that_is_not_set_is_refused_in_a_path(path, left, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = f"must be a path, got {path!r}, of which {left} is no variable of the environment; set"
    with pytest.raises(ValueError, match=re.escape(f"GOLDConfig: output_dir {told}")):
        GOLDConfig(output_dir=path, use_cpu=True)
    with pytest.raises(ValueError, match=re.escape(f"gold-trainer train: dataset_name {told}")):
        parse_arguments([*CPU, "--dataset_name", path])
    folder = tmp_path / path.removeprefix("/")
    folder.mkdir(parents=True)  # which is called so
    assert GOLDConfig(output_dir=str(folder), use_cpu=True).output_dir == str(folder)


def test_layers_of_an_adapter_are_names_or_one_regular_expression():
    pytest.importorskip("peft")

    def modules(*names):
        argv = [*CPU, "--use_peft", "--lora_target_modules", *names]
        return _lora_config(parse_arguments(argv)[0]).target_modules

    assert modules("q_proj", "v_proj") == {"q_proj", "v_proj"}
    assert modules("q_proj") == {"q_proj"}
    assert modules("all-linear") == "all-linear"
    assert modules(r".*language_model.*\.q_proj") == r".*language_model.*\.q_proj"
    with pytest.raises(ValueError, match=r"must be a list of names, got \['q_proj,v_proj'\]; sep"):
        modules("q_proj,v_proj")


def test_a_configuration_of_a_file_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    data = DataArguments(dataset_name=os.fspath(tmp_path / "rows.jsonl"), dataset_config="en")
    with pytest.raises(ValueError, match="dataset_config must be left out for a path, got 'en'"):
        load_rows(data, "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eos_token", "there is no field 'eos_token'; the end of a turn is the chat template's"),
        ("cache_implementation", "the writer of rollouts has a cache of its own"),
        ("max_new_tokens", "did you mean max_completion_length"),
        ("bta", r"did you mean beta\?"),
        ("xyzzy_q", "gold-trainer train --help-all lists the fields"),
    ],
)
def test_a_field_that_there_is_not_has_the_remedy_of_a_flag_in_python_too(name, message, tmp_path):
    with pytest.raises(ValueError, match=f"^GOLDConfig: .*{message}"):
        GOLDConfig(output_dir=str(tmp_path), **{name: 1})


def test_two_revisions_of_a_teacher_are_refused(tmp_path):
    fields = {"teacher_model_revision": "v1", "teacher_model_init_kwargs": {"revision": "v2"}}
    with pytest.raises(ValueError, match=r"must be without revision where .* got 'v2' and 'v1'"):
        GOLDConfig(output_dir=str(tmp_path), use_cpu=True, **fields)
    fields["teacher_model_init_kwargs"] = {"revision": "v1"}
    GOLDConfig(output_dir=str(tmp_path), use_cpu=True, **fields)


def test_fields_are_named_by_flags_in_any_spelling_and_by_what_a_file_sets(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 1\nbf16: null\n")
    argv = [str(tmp_path / "c.yaml"), "--use-cpu", "--no_shuffle", "--run_name=fp16"]
    assert named_fields(argv) == {"seed", "use_cpu", "shuffle", "run_name"}

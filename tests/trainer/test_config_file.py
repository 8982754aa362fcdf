"""A YAML file is read as its author means it; else one line names file and place."""

import sys

import pytest

from gold_trainer.__main__ import main
from gold_trainer.command_line import parse_arguments


def parsed(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    return parse_arguments([str(tmp_path / "c.yaml"), "--use_cpu"])


def refusal(capsys, tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["train", str(path)]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == shown.count("error: ") == 1, shown
    return shown


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.0e-5", "+.1e-4", "0.00001"])
def test_number_with_an_exponent_is_a_number_in_dicts_too(number, tmp_path):
    text = f"learning_rate: {number}\nlr_scheduler_kwargs: {{min_lr: {number}}}\n"
    text += f"teacher_model_init_kwargs:\n  nested:\n    alpha: {number}\n"
    _, _, config = parsed(tmp_path, text)
    assert config.learning_rate == config.lr_scheduler_kwargs["min_lr"] == 1e-5
    assert config.teacher_model_init_kwargs == {"nested": {"alpha": 1e-5}}


@pytest.mark.parametrize("word", ["1e", "e5", "1e-5x", "v1e5", "123-456"])
def test_words_that_look_like_numbers_stay_words(word, tmp_path):
    assert parsed(tmp_path, f"dataset_config: {word}\n")[1].dataset_config == word


@pytest.mark.parametrize(("word", "value"), [("yes", True), ("on", True), ("true", True)])
def test_words_of_yaml_for_true_and_false(word, value, tmp_path):
    other = {"yes": "no", "on": "off", "true": "false"}[word]
    text = f"seq_kd: {word}\nlmbda: 0.5\ndisable_dropout: {other}\nsave_strategy: {other}\n"
    if word == "true":
        text = text.replace("save_strategy: false", "save_strategy: no")
    _, _, config = parsed(tmp_path, text)
    assert (config.seq_kd, config.disable_dropout, config.save_strategy) == (value, False, "no")


def test_resume_true_is_the_word(tmp_path):
    _, _, config = parsed(tmp_path, "resume_from_checkpoint: true\n")
    assert config.resume_from_checkpoint.lower() == "true"


def test_lists_reach_fields_that_take_one_text_too(tmp_path):
    text = "report_to: [tensorboard, wandb]\ndataset_ignore_columns: []\nlora_target_modules: [a]\n"
    model, _, config = parsed(tmp_path, text)
    assert config.report_to == ["tensorboard", "wandb"]
    assert config.dataset_ignore_columns == [] and model.lora_target_modules == ["a"]


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfbeta: 0.25\n")
    assert parse_arguments([str(tmp_path / "c.yaml")])[2].beta == 0.25


def test_a_flag_wins_over_a_null_and_a_list_of_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("max_length: null\nreport_to: [wandb]\n")
    argv = [str(tmp_path / "c.yaml"), "--max_length", "512", "--report_to", "none"]
    _, _, config = parse_arguments(argv)
    assert (config.max_length, config.report_to) == (512, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("beta: 0.1\nlmbda: 0\nbeta: 0.2\n", "line 3, beta stands twice, first in line 1"),
        ("lr_scheduler_kwargs:\n  a: 1\n  a: 2\n", "line 3, a stands twice, first in line 2"),
        ("loss_kwargs: {alpha: 0.1, alpha: 0.2}\n", "line 1, alpha stands twice, first in line 1"),
        ("beta: 0.1\n\tlmbda: 0\n", "line 2, "),
        ("beta: 0.1\n  lmbda: 0\n", "line 2, mapping values are not allowed here"),
        ("beta: [0.1\n", "is not valid YAML: line 2"),
        ("beta: 0.1\n--- \nlmbda: 0\n", "line 2, but found another document"),
        ("beta: !!python/name:os.system x\n", "is not valid YAML: line 1, could not determine"),
        ("system_prompt: caf\u00e9\n".encode("latin-1"), "UTF-8 is expected, got byte 0xe9 at 18"),
        (b"\xff\xfeb\x00", "UTF-8 is expected"),
        ("", "must hold one `name: value` a line, got NoneType"),
        ("- beta: 1\n", "must hold one `name: value` a line, got list"),
        ("beta=0.1\n", "must hold one `name: value` a line, got str"),
        ("learning-rate: 1e-5\n", "unknown key learning-rate; did you mean learning_rate?"),
        ("1: 2\n", "unknown key 1; --help lists"),
        ("beta: [0.1]\n", "beta must be a number, in [0, 1], got [0.1]"),
        ("beta: {a: 1}\n", "invalid float value"),
        ("max_steps: many\n", "invalid int value: 'many'"),
        ("system_prompt: yes\n", "system_prompt must be text, got true, .* put it in quotes"),
        ("seq_kd: maybe\n", "expected one of yes/no, true/false"),
        ("eval_strategy: step\n", "eval_strategy"),
        ("lora_r: 0\n", "lora_r must be at least 1, got 0"),
    ],
)
def test_file_that_cannot_be_read_is_one_line_with_file_and_place(
    content, message, capsys, tmp_path
):
    shown = refusal(capsys, tmp_path, content)
    head, _, tail = message.partition(" .* ")
    assert head in shown and tail in shown, shown


def test_file_that_is_not_there_names_the_recipes(capsys, tmp_path):
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    assert "the recipes are gold_vlm" in capsys.readouterr().err


def test_files_are_refused_before_anything_slow_is_imported(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("gold_trainer.command_line")]:
        monkeypatch.delitem(sys.modules, name)
    assert "stands twice" in refusal(capsys, tmp_path, "beta: 1\nbeta: 1\n")
    assert "gold_trainer.command_line" not in sys.modules

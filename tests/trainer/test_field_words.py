"""Values of fields as people write them in YAML and behind flags."""

import pytest

from gold_trainer.command_line import parse_arguments
from gold_trainer.data.data_files import DataArguments
from gold_trainer.fields.library_options import check_library_options

CPU = ["--output_dir", "runs", "--use_cpu"]


def read(tmp_path, text, *flags):
    (tmp_path / "c.yaml").write_text(text)
    return parse_arguments([str(tmp_path / "c.yaml"), *CPU, *flags])


@pytest.mark.parametrize("word", ["1234567", "12e4567", "0071234", "1_2", "1.10", "0x1f", ".5"])
def test_a_text_that_looks_like_a_number_stays_as_it_is_written(word, tmp_path):
    fields = f"model_revision: {word}\nrun_name: {word}\nstop_strings: [{word}, END]\n"
    model, _, config = read(tmp_path, fields + f"dataset_ignore_columns: {word}")
    assert (model.model_revision, config.run_name) == (word, word)
    assert config.stop_strings == [word, "END"] and config.dataset_ignore_columns == [word]


@pytest.mark.parametrize("value", ["yes", "[off]", "[a, true]"])
@pytest.mark.parametrize("name", ["stop_strings", "dataset_ignore_columns", "report_to"])
def test_a_truth_value_in_the_place_of_texts_is_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be text, got (true|false), as YAML reads"):
        read(tmp_path, f"{name}: {value}")
    with pytest.raises(ValueError, match=r"run_name must be text, got true, as YAML"):
        read(tmp_path, "run_name: yes")


def test_a_null_among_texts_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset_ignore_columns must hold texts, got null; leave"):
        read(tmp_path, "dataset_ignore_columns: [id, null]")
    assert read(tmp_path, "dataset_ignore_columns: null")[2].dataset_ignore_columns is None


@pytest.mark.parametrize(
    "name", ["system_prompt", "run_name", "stop_strings", "lora_target_modules"]
)
@pytest.mark.parametrize("value", ["{a: b}", "[[a, b]]", "[{a: b}]"])
def test_a_dict_or_a_list_in_the_place_of_a_text_is_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name} must be text, got a (dict|list in a list); put"):
        read(tmp_path, f"{name}: {value}")


@pytest.mark.parametrize("value", [True, False])
def test_fsdp_may_be_true_in_a_file_and_behind_a_flag(value, tmp_path):
    word = str(value).lower()
    assert read(tmp_path, f"fsdp: {word}")[2].fsdp is value
    assert parse_arguments([*CPU, "--fsdp", word])[2].fsdp is value


@pytest.mark.parametrize("word", ["1234567", "12e4567", "1.10"])
@pytest.mark.parametrize("side", ["", "teacher_"])
def test_a_revision_that_is_a_number_is_refused_in_a_dict(word, side, tmp_path):
    """A dict has no kinds: what stands in it is a number there."""
    name = f"{side}model_init_kwargs"
    config = read(tmp_path, f"{name}: {{revision: {word}}}")[2]
    with pytest.raises(ValueError, match=f"{name} must have text as revision, got .*; put it in q"):
        check_library_options(config)
    check_library_options(read(tmp_path, f'{name}: {{revision: "{word}"}}')[2])


def test_texts_that_begin_with_a_dash_are_no_flags(tmp_path):
    assert read(tmp_path, 'stop_strings: ["---", "a", "-x"]')[2].stop_strings == ["---", "a", "-x"]
    assert parse_arguments([*CPU, "--stop_strings=---"])[2].stop_strings == ["---"]
    with pytest.raises(ValueError, match=r"stop_strings.*: expected at least one .* behind =, as "):
        parse_arguments([*CPU, "--stop_strings", "---"])


@pytest.mark.parametrize("word", ["None", "null", "none"])
def test_none_is_no_value_in_a_file_and_behind_a_flag(word, tmp_path):
    text = f"max_length: {word}\nchunk_size: {word}\nbf16: {word}\nlearning_rate: 1e-5"
    config = read(tmp_path, text)[2]
    assert (config.max_length, config.chunk_size, config.learning_rate) == (None, None, 1e-5)
    flags = [*CPU, "--max_length", word, "--save_total_limit", word]
    assert (config := parse_arguments(flags)[2]).max_length is config.save_total_limit is None
    assert read(tmp_path, "max_length: 16", "--max_length", word)[2].max_length is None
    with pytest.raises(ValueError, match=f"learning_rate.*: invalid float value: '{word}'"):
        parse_arguments([*CPU, "--learning_rate", word])


@pytest.mark.parametrize(("word", "text"), [("None", None), ("null", None), ("none", "none")])
def test_none_is_no_path_and_no_name(word, text, tmp_path):
    _, data, config = read(tmp_path, f"system_prompt: {word}", "--run_name", word)
    assert (data.system_prompt, config.run_name) == (text, text)
    assert parse_arguments([*CPU, "--dataset_train_split", word])[1].dataset_train_split == word
    assert DataArguments().dataset_train_split == "train"  # which is no field without a value


@pytest.mark.parametrize(
    ("word", "number"), [("1e3", 1000), ("8.0", 8), ("1_000", 1000), ("-1", -1)]
)
def test_whole_numbers_may_be_written_as_others(word, number, tmp_path):
    assert read(tmp_path, f"max_steps: {word}")[2].max_steps == number
    assert parse_arguments([*CPU, "--max_steps", word])[2].max_steps == number


@pytest.mark.parametrize("word", ["2.5", "1e-3", "1/2", "1,000", "1.2.3", "ten"])
def test_what_is_no_whole_number_is_refused(word):
    with pytest.raises(ValueError, match=r"max_steps.*: invalid int value: '"):
        parse_arguments([*CPU, "--max_steps", word])

"""The command line: fields from YAML and flags, datasets of every kind, errors in one message."""

import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from gold_trainer import __main__, configs, loading
from gold_trainer.__main__ import COMMANDS, main
from gold_trainer.command_line import parse_arguments
from gold_trainer.quiet import WARN_OF_THEMSELVES
from gold_trainer.recipes import find_config, recipe_names
from support.tiny_data import write_json_rows
from support.tiny_models import save_tiny_pair, tiny_picture, tiny_rows


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a saved tiny student and teacher."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_pair(folder, "qwen3_vl")
    return folder


@pytest.fixture
def json_rows(tmp_path):
    return write_json_rows(tmp_path / "data", tiny_rows(8))


def write_yaml(path, **fields):
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()))
    return str(path)


def user_error(capsys, *argv):
    """The message of a command that must fail politely."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.count("error: ") == 1  # progress bars may come before it
    return captured.err


def test_flag_wins_over_yaml_and_yaml_over_default(tmp_path):
    config_file = write_yaml(
        tmp_path / "c.yaml", beta=0.1, lmbda=0.2, lora_target_modules=["q_proj", "o_proj"], lora_r=4
    )
    model, _, config = parse_arguments(
        [config_file, "--lmbda", "0.75", "--lora_target_modules", "v_proj"]
    )
    assert (config.beta, config.lmbda, model.lora_r, model.lora_alpha) == (0.1, 0.75, 4, 32)
    assert model.lora_target_modules == ["v_proj"]


def test_yaml_values_of_every_kind_arrive(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "learning_rate: 1e-5  # YAML reads a string\nseq_kd: true\nsystem_prompt: '- short -'\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nmax_length: 64\nmax_completion_length: 8\n"
        "lora_target_modules: [q_proj]\ndataset_config: null\n"
    )
    model, data, config = parse_arguments([str(tmp_path / "c.yaml")])
    assert config.learning_rate == 1e-5
    assert config.seq_kd is True
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}
    assert config.max_length == 64
    assert data.system_prompt == "- short -"
    assert model.lora_target_modules == ["q_proj"]


def test_yaml_no_is_the_word_where_a_field_has_it_and_false_elsewhere(tmp_path):
    (tmp_path / "c.yaml").write_text("save_strategy: no\neval_strategy: no\ndisable_dropout: no\n")
    _, _, config = parse_arguments([str(tmp_path / "c.yaml")])
    assert (config.save_strategy, config.eval_strategy, config.disable_dropout) == (
        SaveStrategy.NO,
        IntervalStrategy.NO,
        False,
    )


def test_flags_alone_are_enough():
    model, data, config = parse_arguments(
        ["--model_name_or_path", "a", "--dataset-name", "b", "--beta=1", "--seq_kd"]
    )
    assert (model.model_name_or_path, data.dataset_name) == ("a", "b")
    assert (config.beta, config.seq_kd) == (1.0, True)


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_parse(name):
    argv = [str(find_config(name)), "--use_cpu", "--bf16", "false"]
    model, data, config = parse_arguments(argv)
    assert config.use_uld_loss == (name == "gold_vlm_cross")
    assert config.teacher_model_name_or_path == "Qwen/Qwen3-VL-8B-Instruct"
    assert config.teacher_model_init_kwargs["dtype"] == "bfloat16"
    assert (data.prompt_column, data.completion_column) == ("problem", "solution")
    assert config.max_completion_length < config.max_length
    assert model.use_peft


def test_help_lists_fields_of_model_data_and_config(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--model_name_or_path", "--dataset_name", "--lmbda", "--learning_rate"):
        assert flag in text


def test_without_a_command_the_usage_is_shown(capsys):
    assert main([]) == 2
    assert "gold-trainer train" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "gold-trainer demo" in capsys.readouterr().out


def test_unknown_command_names_the_commands(capsys):
    assert user_error(capsys, "trian") == (
        "error: unknown command 'trian'; did you mean gold-trainer train?\n"
    )
    text = user_error(capsys, "fit")
    assert "'fit'" in text and "train, check" in text and text.count("\n") == 1


def test_a_recipe_goes_by_its_name_and_a_file_by_its_path(tmp_path, monkeypatch):
    assert recipe_names() == ["gold_vlm", "gold_vlm_cross"]
    assert find_config("gold_vlm").read_text().startswith("#")
    monkeypatch.chdir(tmp_path)
    Path("gold_vlm").mkdir()  # as output_dir may be called
    assert find_config("gold_vlm").is_file()
    write_yaml(Path("mine.yaml"), beta=0.5)
    assert find_config("mine.yaml") == Path("mine.yaml")


def test_what_is_no_file_and_no_recipe_is_refused_with_the_recipes(capsys):
    text = user_error(capsys, "train", "gold_vml", "--beta", "0.5")
    assert "'gold_vml'; the recipes are gold_vlm, gold_vlm_cross" in text


def test_recipes_are_listed_with_their_files(capsys):
    assert main(["recipes"]) == 0
    files = {name: find_config(name) for name in recipe_names()}
    engines = {name: configs.FOLDER / f"{name}.yaml" for name in configs.ENGINES}
    assert all(path.is_file() for path in engines.values())
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if ".yaml" in line]
    assert lines == [[name, str(path)] for name, path in (files | engines).items()]


def test_a_recipe_on_the_command_line_reaches_the_checks_of_its_run(capsys, tmp_path):
    flags = ["--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path), "--beta", "2"]
    assert "beta must be in [0, 1]" in user_error(capsys, "train", "gold_vlm", *flags)


def test_unknown_yaml_key_names_the_nearest_field(capsys, tmp_path):
    config_file = write_yaml(tmp_path / "c.yaml", lambda_=0.5, max_completion_lenght=8)
    assert "did you mean lmbda?" in user_error(capsys, "train", config_file)
    config_file = write_yaml(tmp_path / "c.yaml", max_completion_lenght=8)
    assert "did you mean max_completion_length?" in user_error(capsys, "train", config_file)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--betta", "0.5"], "unknown flag --betta; did you mean beta?"),
        (["--beta", "much"], "error: beta: invalid float value: 'much'; a number is expected"),
        (["--max_steps", "1.5"], "invalid int value: '1.5'; a whole number is expected"),
        (
            ["--dtype", "bf16"],
            "error: dtype: invalid choice: 'bf16'; did you mean bfloat16?",
        ),
        (["--optim", "adam_8bit"], "error: optim: invalid choice: 'adam_8bit'; did you mean ad"),
        (["--loss_backend", "cuda"], "invalid choice: 'cuda'; it may be triton, torch"),
        (["--use_cpu", "maybe"], "error: use_cpu: "),
        (["--beta"], "error: beta: expected one argument"),
        (["--include_num_input_tokens_seen", "all"], "_seen must be 'no', got 'all'; image tok"),
        (["--liger_kernel_config", '{"rope": true}'], "liger_kernel_config must be None, got {"),
        (["--parallelism_config", "{}"], "must be a ParallelismConfig of accelerate, got '{}'"),
        (["--beta", "2"], "beta"),
        (
            ["missing.yaml"],
            "got 'missing.yaml', and there is no such file; the recipes are gold_vlm",
        ),
        (["/"], "got '/', a folder; the recipes are"),
        (["rows.jsonl"], "got 'rows.jsonl'; pass a file of rows as --dataset_name rows.jsonl"),
        (["--lmbda", "0.5", "late.yaml"], "the YAML file comes before the flags"),
        ([], "model_name_or_path is missing"),
        (["--model_name_or_path", "a"], "dataset_name is missing"),
        (["--model_name_or_path", "a", "--dataset_name", "b"], "teacher_model_name_or_path is"),
    ],
)
def test_wrong_arguments_end_in_one_message(capsys, argv, message):
    assert message in user_error(capsys, "train", *argv)


@pytest.mark.parametrize("text", ["just words", "a: [1", "- a\n- b"])
def test_a_file_that_is_no_config_ends_in_one_message(capsys, tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert "c.yaml" in user_error(capsys, "train", str(tmp_path / "c.yaml"))


def train_flags(models, json_rows, output_dir):
    return [
        *("--model_name_or_path", str(models / "student")),
        *("--teacher_model_name_or_path", str(models / "teacher")),
        *("--dataset_name", str(json_rows)),
        *("--output_dir", str(output_dir)),
        *("--per_device_train_batch_size", "2", "--max_steps", "2", "--save_strategy", "no"),
        *("--max_completion_length", "8", "--max_length", "128", "--report_to", "none"),
        *("--learning_rate", "1e-3", "--lmbda", "0.5", "--use_cpu"),
    ]


def test_train_saves_a_student_that_answers(models, json_rows, tmp_path, capsys):
    """Evaluation included."""
    output_dir = tmp_path / "out"
    flags = train_flags(models, json_rows, output_dir)
    flags += [
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--eval_dataset_name",
        str(json_rows),
    ]
    assert main(["train", *flags]) == 0
    assert f"student saved in {output_dir}" in capsys.readouterr().out
    student = AutoModelForImageTextToText.from_pretrained(output_dir)
    processor = AutoProcessor.from_pretrained(output_dir)
    before = AutoModelForImageTextToText.from_pretrained(models / "student")
    assert not student.lm_head.weight.equal(before.lm_head.weight)
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    inputs = processor(text=[prompt], images=[tiny_picture(0)], return_tensors="pt")
    assert student.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("extra", [[], ["--model_init_kwargs", '{"dtype": "float32"}']])
def test_fields_of_the_student_reach_its_weights(models, json_rows, tmp_path, monkeypatch, extra):
    students = []
    load_model = loading.load_model

    def spy(name, *args, **more):
        students.append((name, args[0], load_model(name, *args, **more)))
        return students[-1][2]

    monkeypatch.setattr(loading, "load_model", spy)
    flags = [*train_flags(models, json_rows, tmp_path / "out"), "--max_steps", "1"]
    flags += ["--dtype", "bfloat16", "--attn_implementation", "eager", "--trust_remote_code"]
    assert main(["train", *flags, "--model_revision", "v1", *extra]) == 0
    ((_, options, student),) = (s for s in students if s[0] == str(models / "student"))
    assert (options["revision"], options["trust_remote_code"]) == ("v1", True)
    assert student.dtype == (torch.float32 if extra else torch.bfloat16)
    assert student.config._attn_implementation == "eager"


def test_lora_run_saves_the_adapter(models, json_rows, tmp_path):
    flags = [*train_flags(models, json_rows, tmp_path / "out"), "--use_peft", "--lora_r", "2"]
    assert main(["train", *flags]) == 0
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "processor_config.json").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_bad_row_met_while_training_ends_in_one_message(
    capsys, models, json_rows, tmp_path, workers
):
    lines = json_rows.read_text().splitlines()
    broken = json.loads(lines[2])
    broken["messages"] = broken["messages"][:1]
    json_rows.write_text("\n".join([*lines[:2], json.dumps(broken), *lines[3:]]))
    flags = train_flags(models, json_rows, tmp_path / "out")
    flags += ["--max_steps", "4", "--dataloader_num_workers", workers]
    assert "row 2" in user_error(capsys, "train", *flags)


def test_missing_packages_are_one_message(capsys, models, json_rows, tmp_path, monkeypatch):
    def load_model(*args, **more):
        raise ImportError("4-bit quantization requires bitsandbytes")  # as transformers does

    monkeypatch.setattr(loading, "load_model", load_model)
    flags = train_flags(models, json_rows, tmp_path / "out")
    assert "requires bitsandbytes" in user_error(capsys, "train", *flags)
    for name in [name for name in sys.modules if name.startswith("gold_trainer.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install 'gold-kernels[demo]'" in user_error(capsys, "demo")


def test_nothing_is_written_when_the_configuration_is_wrong(capsys, models, json_rows, tmp_path):
    flags = train_flags(models, json_rows, tmp_path / "out")
    user_error(capsys, "train", *flags, "--beta", "-1")
    user_error(capsys, "train", *flags, "--teacher_model_name_or_path", str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (['["a", "b"]'], ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        (["[END]"], ["[END]"]),
        (["[1]"], ["[1]"]),
    ],
)
def test_a_list_may_be_json(words, expected):
    """Its text was the one stop string, at which nothing stops."""
    flags = ["--use_cpu", "--output_dir", "runs/none", "--stop_strings", *words]
    assert parse_arguments(flags)[2].stop_strings == expected


def test_a_run_that_is_out_of_memory_says_which_command_helps(capsys, monkeypatch):
    def train(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setitem(COMMANDS, "train", train)
    assert main(["train"]) == 1
    shown = capsys.readouterr().err
    assert "allocate 2.00 GiB. `gold-trainer plan` with the same arguments" in shown
    assert shown.count("\n") == 1
    Path(re.search(r"traceback: (\S+)\)", shown)[1]).unlink()


def test_warnings_of_libraries_about_each_other_are_not_those_of_a_run(monkeypatch, caplog):
    def noisy(module):
        for name in WARN_OF_THEMSELVES:
            logging.getLogger(name).warning("of itself")
        logging.getLogger("another").warning("heard")
        return SimpleNamespace(run=1)

    monkeypatch.setattr(__main__, "import_module", noisy)
    assert __main__._load("anything", "run") == 1
    assert [record.getMessage() for record in caplog.records] == ["heard"]

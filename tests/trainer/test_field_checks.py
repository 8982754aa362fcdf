"""Every field with a value of another kind, or an absurd one: one sentence that names it."""

import dataclasses
import json
import math
import re
import types
import typing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import TrainingArguments

from gold_trainer import GOLDConfig, GOLDTrainer
from gold_trainer.__main__ import main
from gold_trainer.command_line import ModelArguments
from gold_trainer.config import DICTS
from gold_trainer.data.dataset import RowDataset
from gold_trainer.fields.checks import RANGES, check_fields
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import FIELDS

HINTS = typing.get_type_hints(GOLDConfig)
NO_NUMBERS = ["x", "1e-4", [1], {}, b"1", 1j, object()]
NOT_FINITE = [math.nan, math.inf, -math.inf]


def kinds_of(name):
    hint = HINTS[name]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def of_kind(*kinds):
    fields = [field.name for field in dataclasses.fields(GOLDConfig) if field.init]
    return [name for name in fields if set(kinds_of(name)) - {types.NoneType} == set(kinds)]


def refusal(folder, **fields):
    with pytest.raises(ValueError) as caught:
        GOLDConfig(**({"output_dir": str(folder / "run"), "use_cpu": True} | fields))
    assert not (folder / "run").exists()
    return str(caught.value)


def assert_refused(folder, name, value):
    message = refusal(folder, **{name: value})
    assert message.startswith(f"GOLDConfig: {name} must be "), f"{value!r}: {message}"
    assert ", got " in message and "; " in message and "\n" not in message


NUMBERS = of_kind(int) + of_kind(float)


def test_the_fields_of_numbers_are_all_here():
    assert {"beta", "chunk_size", "learning_rate", "max_steps", "seed", "top_p"} <= set(NUMBERS)
    own = {
        field.name for kind in (GOLDConfig, ModelArguments) for field in dataclasses.fields(kind)
    }
    assert set(RANGES) <= own


@pytest.mark.parametrize("name", NUMBERS)
def test_number_of_another_kind_or_not_finite_is_refused(name, tmp_path):
    values = [*NO_NUMBERS, *NOT_FINITE, True, *([1.5] if name in of_kind(int) else [])]
    values += [] if types.NoneType in kinds_of(name) else [None]
    for value in values:
        assert_refused(tmp_path, name, value)


@pytest.mark.parametrize("name", [name for name in NUMBERS if name in RANGES])
def test_number_out_of_its_range_is_refused_and_its_ends_are_as_they_are_written(name, tmp_path):
    range_, remedy = RANGES[name]
    outside = [range_.low - 1, *([range_.low] if range_.is_open else [])]
    outside += [range_.high + 1] if math.isfinite(range_.high) else []
    for value in outside:
        assert_refused(tmp_path, name, value)
        assert remedy in refusal(tmp_path, **{name: value})


@pytest.mark.parametrize("name", of_kind(bool))
def test_words_and_numbers_are_no_truth_values(name, tmp_path):
    for value in ("false", "no", 0, 1.0, [True], {}):
        assert_refused(tmp_path, name, value)


@pytest.mark.parametrize("name", [*of_kind(dict, str), *of_kind(dict[str, typing.Any], str)])
def test_dict_is_a_dict_or_its_json(name, tmp_path):
    for value in ("x", "{x", "[1]", [1], True, 1.5, b"{}"):
        assert_refused(tmp_path, name, value)


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("eval_strategy", "step", "steps"),
        ("lr_scheduler_type", "cosin", "cosine"),
        ("optim", "adamw_torc", "adamw_torch"),
        ("on_nonfinite", "skipp", "skip"),
    ],
)
def test_word_that_is_no_choice_is_refused_with_the_nearest(name, value, nearest, tmp_path):
    assert_refused(tmp_path, name, value)
    assert f"did you mean '{nearest}'?" in refusal(tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["teacher_model_name_or_path", "bf16", "beta"])
def test_list_of_texts_is_neither_text_nor_number(name, tmp_path):
    with pytest.raises(ValueError, match=rf"^GOLDConfig: {name} must be .*, got \['x'\]; "):
        GOLDConfig(output_dir=str(tmp_path), **{name: ["x"]})


@pytest.mark.parametrize("value", [1e-7, -1, "x", 0])
def test_budget_that_holds_nothing_is_refused(value, tmp_path):
    assert_refused(tmp_path, "loss_budget_mib", value)


def test_numbers_of_other_libraries_paths_and_whole_floats_are_taken(tmp_path):
    config = GOLDConfig(
        output_dir=tmp_path,
        max_steps=1e3,
        chunk_size=np.int64(8),
        beta=np.float32(0.25),
        teacher_model_name_or_path=Path("x/y"),
        learning_rate=1,
        resume_from_checkpoint=True,
    )
    assert (config.max_steps, config.chunk_size, config.beta) == (1000, 8, 0.25)
    assert type(config.max_steps) is type(config.chunk_size) is int
    assert config.teacher_model_name_or_path == "x/y"
    assert config.resume_from_checkpoint == "true"


def test_a_config_that_was_made_can_be_made_again(tmp_path):
    config = GOLDConfig(output_dir=str(tmp_path), save_steps=7, accelerator_config={})
    assert dataclasses.replace(config, beta=0.1).save_steps == 7


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"lora_r": 0}, "lora_r"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"dtype": "f4"}, "dtype"),
    ],
)
def test_fields_of_the_student_are_checked_alike(fields, name):
    with pytest.raises(ValueError, match=f"^gold-trainer train: {name} must be "):
        check_fields(ModelArguments(**fields), "gold-trainer train")


TEXTS_IN_JSON = {
    "model_init_kwargs": '{"revision": "007"}',
    "teacher_model_init_kwargs": '{"revision": "1e4"}',
    "teacher_models": '{"math": "007"}',
    "chat_template_kwargs": '{"note": "null"}',
    "loss_kwargs": '{"alpha": 0.25}',
    "token_weighting_kwargs": '{"note": "12"}',
    "generation_kwargs": '{"prompt_lookup_num_tokens": "7"}',
}


def test_each_dict_of_ours_is_read_from_json_and_its_texts_stay_texts(tmp_path):
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    dicts = {name for name, hint in HINTS.items() if dict in map(typing.get_origin, kinds_of(name))}
    assert dicts - inherited == set(DICTS) == set(TEXTS_IN_JSON)
    for name, text in TEXTS_IN_JSON.items():
        loss = {"loss": "skew_kl"} if name == "loss_kwargs" else {}
        config = GOLDConfig(output_dir=str(tmp_path), use_cpu=True, **loss, **{name: text})
        assert getattr(config, name) == json.loads(text)


VALUES = {
    int: ["x", "1.5", "nan", "[1]"],
    float: ["x", "nan", "inf", "-inf", "[0.1]"],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_command_line_refuses_a_bad_number_with_exit_code_2(name, tmp_path, capsys):
    kind = int if int in kinds_of(name) else float
    for value in VALUES[kind]:
        assert main(["train", "--output_dir", str(tmp_path), f"--{name}={value}"]) == 2
        assert_one_sentence(capsys.readouterr(), name)
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({name: yaml.safe_load(value)}))
        assert main(["train", str(tmp_path / "c.yaml")]) == 2
        assert_one_sentence(capsys.readouterr(), name)


def assert_one_sentence(shown, name):
    assert re.search(rf"\b{name}\b", shown.err), shown.err
    assert shown.err.count("\n") == shown.err.count("error: ") == 1, shown.err
    assert "Traceback" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lmbda", 7.0, r"lmbda must be in \[0, 1\], got 7.0"),
        ("betta", 0.0, r"there is no field 'betta'; did you mean beta\?"),
        ("num_generations", 3, r"num_generations must divide .* = 4 \* 1, got 3"),
        ("report_to", None, None),
        ("per_device_train_batch_size", 2, None),
    ],
)
def test_a_field_that_is_set_afterwards_is_checked_by_the_trainer(name, value, message, tmp_path):
    args = GOLDConfig(output_dir=str(tmp_path), **FIELDS)
    setattr(args, name, value)
    make = partial(
        GOLDTrainer,
        model=tiny("qwen3")[0],
        teacher_model=tiny("qwen3", "teacher")[0],
        args=args,
        train_dataset=tiny_rows(4),
        processing_class=tiny("qwen3")[1],
    )
    if message is None:
        assert make().args.generation_batch_size == args.per_device_train_batch_size
        make(model=tiny("qwen3")[0]).train()  # the same config a second time
        return
    with pytest.raises(ValueError, match=f"^GOLDConfig: {message}"):
        make()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chat_template_kwargs", {"enable_thinking": "False"}),
        ("chat_template_kwargs", '{"enable_thinking": "false"}'),
        ("model_init_kwargs", {"trust_remote_code": "false"}),
        ("teacher_model_init_kwargs", {"quantization_config": {"load_in_4bit": "true"}}),
        ("gradient_checkpointing_kwargs", {"use_reentrant": " false"}),
        ("generation_kwargs", '{"renormalize_logits": "True"}'),
    ],
)
def test_truth_in_quotes_is_refused(name, value, tmp_path):
    """Templates and from_pretrained take the text "false" for true."""
    message = rf"^GOLDConfig: {name} must have true or false without quotes for \w+, got the text '"
    with pytest.raises(ValueError, match=message):
        GOLDConfig(output_dir=str(tmp_path), **{name: value})
    GOLDConfig(output_dir=str(tmp_path), teacher_models={"a": "true", "b": "false"})


def test_an_empty_picture_folder_is_not_the_current_one(tmp_path):
    with pytest.raises(ValueError, match="picture_folder must be a folder that exists, got ''; No"):
        GOLDConfig(output_dir=str(tmp_path), picture_folder="")


@pytest.mark.parametrize("kwargs", [{"enable_thinking": "false"}, '{"enable_thinking": "true"}'])
def test_truth_in_quotes_of_a_row_names_the_row(kwargs):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"messages": turns, "chat_template_kwargs": kwargs}
    with pytest.raises(
        ValueError, match=r"^row 0: chat_template_kwargs must have true or false wi"
    ):
        RowDataset([row], needs_completion=True, is_text=True)[0]

"""What cannot be saved shows before the first step, or is mended: not at the first checkpoint."""

import json
from copy import deepcopy

import pytest
import torch

from gold_trainer import GOLDConfig, GOLDTrainer
from gold_trainer.__main__ import main
from gold_trainer.survival import survive
from support.tiny_models import save_tiny_pair, tiny, tiny_rows
from support.trainer_cases import make_trainer

ROWS = tiny_rows(4)
SAVES = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, "temperature, top_p"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"pad_token_id": -1}, "pad_token_id"),
        ({"temperature": 0.6, "do_sample": True}, None),
    ],
)
def test_flags_without_effect_of_a_published_model_do_not_end_the_run(
    flags, names, tmp_path, caplog
):
    student = tiny("qwen3")[0]
    for name, value in flags.items():
        setattr(student.generation_config, name, value)
    trainer = make_trainer(tmp_path, ROWS, "qwen3", student=student, **SAVES)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-1" / "generation_config.json").read_text())
    assert ("that have no effect" in caplog.text) == (names is not None)
    if names is not None:
        assert f"that have no effect: {names}." in caplog.text
        assert not saved.keys() & (flags.keys() - {"pad_token_id"})
    else:
        assert saved["temperature"] == 0.6


def test_a_student_without_a_generation_config_is_saved(tmp_path):
    student = tiny("qwen3")[0]
    student.generation_config = None
    make_trainer(tmp_path, ROWS, "qwen3", student=student, lmbda=1.0, **SAVES).train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


def number_that_json_does_not_know(trainer):
    trainer.model.config.rate = torch.ones(2)


def option_that_json_does_not_know(trainer):
    trainer.prepared.student_processor.init_kwargs["hook"] = object()


def function_that_has_no_name(trainer):
    trainer.args.hook = lambda: None


def temperature_of_old_models(trainer):
    trainer.model.config.temperature = 0.5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (number_that_json_does_not_know, "config of the student .* got TypeError"),
        (option_that_json_does_not_know, "processing_class .* got TypeError"),
        (function_that_has_no_name, "args must be one that can be saved, got"),
        (temperature_of_old_models, "config of the student .*{'temperature': 0.5"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_first_step(spoil, message, tmp_path, caplog):
    processor = deepcopy(tiny("qwen3")[1])
    trainers = [
        make_trainer(tmp_path / name, ROWS, "qwen3", processor=processor, save_strategy=name)
        for name in ("steps", "no")
    ]
    for trainer in trainers:
        spoil(trainer)
    with pytest.raises((ValueError, RuntimeError), match=f"^GOLDTrainer: the {message}.*; mend it"):
        trainers[0].train()
    assert trainers[0].state.global_step == 0 and not list(tmp_path.glob("steps/checkpoint-*"))
    trainers[1].train()
    assert "mend it, or no checkpoint can be written" in caplog.text


def test_a_command_that_saves_at_its_end_alone_looks_at_its_beginning(
    tmp_path, caplog, monkeypatch
):
    check, looks = survive.check_savable, []

    def watched(*given, is_due):
        looks.append(is_due)
        check(*given, is_due=is_due)

    monkeypatch.setattr(survive, "check_savable", watched)
    models = save_tiny_pair(tmp_path, "qwen3")
    path = models / "student" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row) for row in ROWS))
    argv = ["train", "--model_name_or_path", str(models / "student"), "--save_strategy", "no"]
    argv += ["--teacher_model_name_or_path", str(models / "teacher"), "--use_cpu", "--max_steps=1"]
    argv += ["--dataset_name", str(rows), "--output_dir", str(tmp_path / "run"), "--lmbda", "0"]
    assert main([*argv, "--report_to", "none", "--learning_rate", "1e-3"]) == 0
    assert "that have no effect: temperature." in caplog.text
    assert looks == [True], "once, and what cannot be saved ends the run"
    saved = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert "temperature" not in saved


@pytest.mark.parametrize("side", ["model", "teacher_model"])
@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("adapter_config.json", "it holds an adapter alone: load it with peft and pass the model"),
        ("checkpoint-7/config.json", "it holds checkpoints of a run .*give .*checkpoint-7"),
        ("notes.txt", "check its spelling and your access to it"),
    ],
)
def test_a_folder_that_a_run_has_left_is_named_for_what_it_holds(file, remedy, side, tmp_path):
    path = tmp_path / "left" / file
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    models = {"model": tiny("qwen3")[0], "teacher_model": tiny("qwen3", "teacher")[0]}
    models[side] = str(tmp_path / "left")
    args = GOLDConfig(output_dir=str(tmp_path / "run"), use_cpu=True)
    with pytest.raises(ValueError, match=rf"(?s)which cannot be read \(.*\); {remedy}.*\.$"):
        GOLDTrainer(**models, args=args, train_dataset=ROWS, processing_class=tiny("qwen3")[1])

"""Help and misspelt flags: ours first, what was meant, before anything slow is imported."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gold_kernels.losses import LOSSES
from gold_trainer import GOLDConfig, flags
from gold_trainer.__main__ import COMMANDS, main
from gold_trainer.command_line import ModelArguments
from gold_trainer.data.data_files import DataArguments

SLOW = ("torch", "transformers", "datasets", "numpy")


def test_fields_read_from_the_sources_are_those_of_the_classes():
    fields = [
        field
        for kind in (ModelArguments, DataArguments, GOLDConfig)
        for field in dataclasses.fields(kind)
        if field.init
    ]
    assert set(flags.all_names()) == {field.name for field in fields}
    helps = {flag.name: flag.help for _, group in flags.own_groups() for flag in group}
    own = [field for field in fields if field.name in helps]
    assert len(own) > 60
    for field in own:
        assert field.metadata["help"] == helps[field.name], field.name
    ours = [name for name, kind in LOSSES.items() if kind.__module__.startswith("gold_kernels.")]
    assert len(ours) == 4 and all(name in helps["loss"] for name in ours)


def test_help_shows_our_fields_first_with_defaults_and_the_way_to_the_rest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    places = [text.index(f"--{name}\n") for name in ("model_name_or_path", "lmbda", "output_dir")]
    assert places == sorted(places)
    assert "[0.5]" in text and "--help-all" in text
    assert text.count("--lmbda\n") == 1
    assert len(text.splitlines()) < 400
    assert all(len(line) <= 100 for line in text.splitlines())


def test_help_all_lists_what_transformers_has(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help-all"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--adam_beta1" in text and "--lmbda" in text


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "check-data"])
def test_help_of_every_command_says_what_it_does_and_usage_names_it(command, capsys):
    assert main(["--help"]) == 0
    assert f"gold-trainer {command} " in capsys.readouterr().out
    try:
        code = main([command, "--help"])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 0 and not shown.err
    assert shown.out.startswith(f"usage: gold-trainer {command}")
    assert len(shown.out.splitlines()) > 3
    assert all(len(line) <= 100 for line in shown.out.splitlines())


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--help"],
        ["train", "--packing"],
        ["train", "gold_vlm", "--betta", "1"],
        ["--help"],
        ["recipes"],
        ["vllm-command", "--help"],
        ["teacher-command", "--help"],
    ],
)
def test_help_and_usage_errors_import_nothing_slow(argv):
    code = (
        "import sys; from gold_trainer.__main__ import main\n"
        f"try: main({argv!r})\n"
        "except SystemExit: pass\n"
        f"print([name for name in {SLOW!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("flag", "remedy"),
    [
        ("--load_in_4bit", "quantization_config"),
        ("--load-in-8bit", "quantization_config"),
        ("--config", "the YAML file comes first, without a flag"),
        ("--use_bnb_nested_quant", "quantization_config"),
        ("--bnb_4bit_quant_type", "quantization_config"),
        ("--vllm_structured_outputs_regex", 'set generation_kwargs to {"structured_outputs"'),
        ("--activation_offloading", 'set gradient_checkpointing_kwargs to {"offload": true}'),
        ("--max_prompt_length", "max_length holds prompt and completion together"),
        ("--max_new_tokens", "did you mean max_completion_length?"),
        ("--dataset_num_proc", "did you mean dataloader_num_workers?"),
        ("--packing", "did you mean padding_free?"),
        ("--eval-packing", "did you mean padding_free?"),
        ("--use_prefix_grouper", "did you mean share_prompts?"),
        ("--assistant_only_loss", "the completion alone is learnt"),
        ("--use_dora", "from Python pass peft_config="),
        ("--wandb_entity", "WANDB_PROJECT"),
        ("--loss_type", "did you mean loss?"),
        ("--add_tail_bucket", "all other tokens always are an outcome: leave it out"),
        ("--teacher_top_k", "did you mean loss_top_k?"),
        ("--no_cuda", "did you mean use_cpu?"),
        ("--save_safetensors", "always saved that way"),
        ("--lr", "did you mean learning_rate?"),
        ("--batch_size", "did you mean per_device_train_batch_size?"),
        ("--torch_dtype", "did you mean dtype?"),
        ("--teacher_model", "did you mean teacher_model_name_or_path?"),
        ("--uld_use_hybrid", "did you mean uld_use_hybrid_loss?"),
        ("--lambda", "did you mean lmbda?"),
        # fields that transformers no longer has, and names of other scripts
        ("--warmup_ratio", "did you mean warmup_steps? Below 1 it is a share of the steps"),
        ("--use_ipex", "transformers has it no more: leave it out"),
        ("--half_precision_backend", "16 bits are torch's own: leave it out"),
        ("--adafactor", "did you mean optim? Its value is then adafactor"),
        ("--push_to_hub_token", "did you mean hub_token?"),
        ("--dispatch_batches", "every device takes per_device_train_batch_size rows"),
        ("--fsdp_transformer_layer_cls_to_wrap", "did you mean fsdp_config?"),
        ("--generation_max_length", "an evaluation writes no completions"),
        ("--use_auth_token", "HF_TOKEN"),
        ("--validation_file", "did you mean eval_dataset_name?"),
        ("--max_train_samples", "did you mean dataset_train_split? Write train[:1000]"),
        ("--train_batch_size", "did you mean per_device_train_batch_size?"),
        ("--grad_accum_steps", "did you mean gradient_accumulation_steps?"),
        ("--lora_rank", "did you mean lora_r?"),
        ("--distill_temperature", "did you mean loss_temperature?"),
        ("--kd_alpha", "did you mean distillation_weight? For the alpha of skew KL"),
        ("--student_model", "did you mean model_name_or_path?"),
        ("--teacher_name", "did you mean teacher_model_name_or_path?"),
        # what is near to nothing
        *(
            (f"--{name}", "--help lists the fields")
            for name in ("xyzzy", "entropy_coef", "vespo_k")
        ),
    ],
)
def test_flag_that_there_is_not_says_what_was_meant(flag, remedy, capsys, tmp_path):
    assert main(["train", flag, "x"]) == 2
    assert remedy in capsys.readouterr().err
    key = flag.lstrip("-").partition("=")[0].replace("-", "_")
    (tmp_path / "c.yaml").write_text(f"{key}: 1\n")
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    shown = capsys.readouterr().err
    assert f"c.yaml: unknown key {key}" in shown and remedy in shown


@pytest.mark.parametrize("value", ["-1e-5", "-1E5", "-.5", "-1", "-2.5e+3", "-inf"])
def test_negative_numbers_are_values_and_meet_the_check_of_their_field(value, capsys):
    assert main(["train", "--learning_rate", value, "--output_dir", "runs/none"]) == 2
    shown = capsys.readouterr().err
    assert "learning_rate must be" in shown and f"got {float(value)}" in shown


@pytest.mark.parametrize("flag", ["--lora-r", "--no_disable_dropout", "--output_dir=x"])
def test_flags_that_argparse_knows_pass(flag):
    flags.check_names([flag])


@pytest.mark.parametrize("name", ["bf16", "gradient_checkpointing"])
def test_flag_that_would_turn_off_what_is_not_on_says_how_to_write_it(name, tmp_path, capsys):
    assert main(["train", f"--no_{name}", "--output_dir", str(tmp_path)]) == 2
    assert f"unknown flag --no_{name}; write --{name} false" in capsys.readouterr().err


def test_a_question_ends_a_message_without_a_full_stop():
    with pytest.raises(ValueError, match=r"no field 'learning_rat'; did you mean learning_rate\?$"):
        flags.check_keywords("GOLDConfig", ["learning_rat"], ["learning_rate"])
    with pytest.raises(ValueError, match=r"no field 'qqq'; .*\.$"):
        flags.check_keywords("GOLDConfig", ["qqq"], ["learning_rate"])
    files = Path(flags.__file__).parent.rglob("*.py")
    texts = {str(file): file.read_text(encoding="utf-8") for file in files}
    assert sum("did_you_mean(" in text for text in texts.values()) > 8
    assert [
        name for name, text in texts.items() if re.search(r"did_you_mean\([^{}]*\)\}\.", text)
    ] == []

"""What a new user meets: a banner, a first log, warnings that matter and no others, a card."""

import json
import subprocess
import sys

import pytest
from transformers.utils import is_flash_attn_2_available

from gold_trainer import GOLDConfig, loading, refusals
from gold_trainer.__main__ import main
from gold_trainer.model_card import card_facts, write_card
from gold_trainer.recipes import recipe_names
from support.forks import Forked
from support.tiny_models import save_tiny_pair, tiny_rows
from support.trainer_cases import FIELDS, make_trainer

ROWS = tiny_rows(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny_pair(folder, "qwen3_vl")
    rows = [{"problem": "What is it?", "solution": "A bar.", "image": None}] * 4
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def flags_of(folder, output_dir):
    return [
        *("--model_name_or_path", str(folder / "student")),
        *("--teacher_model_name_or_path", str(folder / "teacher")),
        *("--dataset_name", str(folder / "rows.jsonl"), "--output_dir", str(output_dir)),
        *("--max_length", "256", "--max_completion_length", "8", "--use_cpu"),
        *("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    ]


def test_short_run_shows_a_banner_and_its_first_step(tmp_path, capsys):
    options = {"max_steps": 3, "logging_steps": 10, "gradient_accumulation_steps": 2}
    options["logging_first_step"] = GOLDConfig.logging_first_step  # the default
    fields = options | {"per_device_train_batch_size": 2, "lmbda": 0.25, "max_completion_length": 4}
    trainer = make_trainer(tmp_path, ROWS, **fields)
    trainer.train()
    shown = capsys.readouterr().out
    for text in (
        "8 rows; 4 a step: 2 of a device x 2 micro-batches x 1 process; ",
        "25% of micro-batches",
        "0 of 3",
        "jsd",
        "parameters",
        "conversations: ",
    ):
        assert text in shown, text
    assert shown.index("gold-trainer ") < shown.index("'loss'")
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1]


def test_run_that_learns_from_its_rows_says_so_and_nothing_of_pinned_memory(
    tmp_path, capsys, recwarn
):
    trainer = make_trainer(tmp_path, ROWS, max_steps=1, lmbda=0.0, gradient_accumulation_steps=1)
    trainer.train()
    shown = capsys.readouterr().out
    assert "0% of micro-batches: the rows have the completions" in shown
    assert "1 micro-batch x 1 process;" in shown
    assert [str(w.message) for w in recwarn if "pin_memory" in str(w.message)] == []


@pytest.mark.parametrize(("rate", "is_said"), [(1e-7, True), (9e-7, True), (1e-6, False)])
def test_learning_rate_that_moves_nothing_is_said(rate, is_said, tmp_path, caplog):
    make_trainer(tmp_path, ROWS, learning_rate=rate)
    assert ("hardly moves the weights" in caplog.text) == is_said


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "comet_ml"])
def test_missing_package_of_report_to_shows_before_models_are_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(refusals, "get_available_reporting_integrations", lambda: [])
    monkeypatch.setattr(loading, "load_model", None)
    with pytest.raises(ValueError, match=f"package of {name}, .*pip install"):
        make_trainer(tmp_path, ROWS, student="x/y", teacher="x/z", report_to=[name])


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_misspelt_model_folder_is_said_to_be_missing(side, folder, tmp_path):
    names = {size: str(folder / size) for size in ("student", "teacher")}
    names[side] = names[side][:-2] + "r"
    with pytest.raises(ValueError, match=f"{side} must be.*no such folder; .* has {side}"):
        make_trainer(tmp_path, ROWS, **names)


def test_hub_ids_are_not_taken_for_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert loading.is_missing_folder("runs/first")
    assert loading.is_missing_folder("./first")
    assert loading.is_missing_folder("/models/first")
    assert not loading.is_missing_folder("Qwen/Qwen3-0.6B")
    assert not loading.is_missing_folder("gpt2")
    assert not loading.is_missing_folder("runs")


@pytest.mark.parametrize("kind", ["flash_attention_2", "flashy"])
@pytest.mark.parametrize("side", ["", "teacher_"])
def test_attention_that_is_not_there_is_refused_with_what_is(side, kind, folder, tmp_path):
    if kind != "flashy" and is_flash_attn_2_available():
        pytest.skip("it is installed")
    names = {"student": str(folder / "student"), "teacher": str(folder / "teacher")}
    options = {f"{side}model_init_kwargs": {"attn_implementation": kind}}
    match = (
        rf"attn_implementation must be .*, got '{kind}' for .*{side[:-1]}.*; write sdpa, or leave"
    )
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, ROWS, **names, **options)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {}])
def test_either_name_of_checkpointing_sets_it_without_a_warning(options, recwarn):
    args = GOLDConfig(**(FIELDS | options))
    assert bool(args.activation_checkpointing) == bool(options)
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_runs_without_a_warning(name, folder, tmp_path):
    """One of them in a fresh process, as a user starts it, where imports warn too."""
    flags = [*flags_of(folder, tmp_path), "--max_steps", "1", "--warmup_steps", "0"]
    command = ["gold_trainer", "train", name, *flags]
    if name == recipe_names()[0]:
        fresh = [sys.executable, "-W", "always", "-m", *command]
        done = subprocess.run(fresh, capture_output=True, text=True)
    else:
        done = Forked(tmp_path / "output", *command, warns_always=True)
        done.wait(120)
    assert done.returncode == 0, done.stderr
    assert f"student saved in {tmp_path}" in done.stdout
    own = [line for line in done.stderr.splitlines() if "Warning" in line or "deprecat" in line]
    # torch's of torchao, an extra package that peft imports where it is installed
    others = ("ImportWarning", "torch/utils/_pytree.py")
    assert not [line for line in own if not any(other in line for other in others)], done.stderr


def test_saved_student_has_a_card_with_teacher_loss_data_versions_and_metrics(folder, tmp_path):
    flags = [*flags_of(folder, tmp_path), "--max_steps", "2", "--lmbda", "0", "--loss", "skew_kl"]
    flags += ["--prompt_column", "problem", "--completion_column", "solution"]
    assert main(["train", *flags, "--report_to", "none", "--save_strategy", "no"]) == 0
    card = (tmp_path / "README.md").read_text()
    for text in (
        str(folder / "teacher"),
        "skew_kl",
        "rows.jsonl, 4 rows",
        "transformers",
        "| loss |",
        "| loss_temperature | 1 |",
    ):
        assert text in card, text


def test_card_of_an_adapter_is_ours_and_a_user_s_own_card_stays(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(tmp_path, ROWS, peft_config=config)
    trainer.train()
    trainer.save_model()
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    assert "gold-trainer" in (tmp_path / "README.md").read_text()
    args = trainer.args
    args.use_uld_loss, args.uld_use_hybrid_loss, args.beta = True, True, 0.0
    facts = card_facts(trainer)
    text = write_card(args, dataset=None, **facts).read_text()
    assert "| loss | hybrid uld across tokenizers, beta 0 |" in text
    assert "| temperature |" not in text, "that is the name of the field of sampling"
    other = make_trainer(tmp_path / "other", ROWS)
    (tmp_path / "other").mkdir(exist_ok=True)
    (tmp_path / "other" / "README.md").write_text("mine")
    other.save_model()
    assert (tmp_path / "other" / "README.md").read_text() == "mine"

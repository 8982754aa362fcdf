"""Models, losses, runs and first steps of users, by command line: done, or one sentence."""

import json
from typing import Any

import pytest

from gold_trainer.survival.run_lock import NAME
from support.tiny_models import tiny_rows
from support.walk import CHAT, Case, walk

ROWS = tiny_rows(4)


def done(name: str, flags: str, says: str = "", **options: Any) -> Case:
    return Case(name, ROWS, flags, 0, says, **options)


def refused(name: str, says: str, flags: str, **options: Any) -> Case:
    return Case(name, ROWS, flags, 2, says, **options)


MODELS = [
    done("a text family", "", family="llama"),
    done("another vision-language family", "", family="lfm2_vl"),
    done("two families", "--use_uld_loss", family="qwen3", student="llama"),
    done("two families, entry by entry", "--use_uld_loss --use_extended_uld no", student="lfm2_vl"),
    refused("two families without the loss for them", "use_uld_loss", "", student="lfm2_vl"),
    refused("a text student of a teacher with pictures", "vision-language", "", student="llama"),
    done("an adapter", "--use_peft --lora_r 2"),
    refused(
        "an adapter of layers that there are not",
        "no_such",
        "--use_peft --lora_target_modules no_such",
    ),
    refused("an adapter on the head", "lm_head", "--use_peft --lora_target_modules lm_head"),
    done("weights in bfloat16", "--dtype bfloat16"),
    done(
        "gradient checkpointing, and bf16",
        "--gradient_checkpointing --bf16",
        says="computed in bf16; gradient_checkpointing is on",
    ),
    refused("a dtype that there is not", "dtype: invalid choice", "--dtype float8"),
    refused(
        "an attention that there is not",
        "attn_implementation|flash_what",
        "--attn_implementation flash_what",
    ),
    refused(
        "an option that no model has",
        "arguments of from_pretrained",
        "--model_init_kwargs '{\"no_such\": 1}'",
    ),
    refused(
        "options that are no json",
        "model_init_kwargs must be a dict",
        "--model_init_kwargs '{dtype'",
    ),
    refused("a folder that is not there", "no such folder", "--model_name_or_path {}/none"),
    refused(
        "a folder without a model", "student must be a model's folder", "--model_name_or_path {}"
    ),
    refused(
        "a teacher that is a dataset",
        "teacher must be a model's folder",
        "--teacher_model_name_or_path {}/rows.jsonl",
    ),
]
RUNS = [
    Case(
        "weights that are no longer finite",
        ROWS,
        "--learning_rate 1e38 --max_steps 4",
        1,
        "must have finite values, got NaN or inf",
    ),
    done(
        "such steps are left out",
        "--learning_rate 1e38 --max_steps 2 --on_nonfinite skip --optim sgd",
    ),
    refused(
        "an argument that no schedule has",
        "lr_scheduler_kwargs must hold arguments of the schedule 'cosine', got 'num_cycle'",
        "--lr_scheduler_type cosine --lr_scheduler_kwargs '{\"num_cycle\": 1}'",
    ),
    refused(
        "an argument that checkpointing does not have",
        "gradient_checkpointing_kwargs must hold .* did you mean use_reentrant?",
        "--gradient_checkpointing_kwargs '{\"use_reentrants\": false}'",
    ),
    refused(
        "a best model by a metric that there is not",
        "metric_for_best_model must be one of loss, .* did you mean forward_kl",
        "--metric_for_best_model forward_ckl --eval_strategy steps --dataset_test_split train",
    ),
    done(
        "a best model by one that there is",
        "--metric_for_best_model forward_kl --eval_strategy steps --dataset_test_split train",
    ),
    refused(
        "a field of accelerate that there is not",
        "accelerator_config must hold split_batches, .* got 'foo'",
        "--accelerator_config '{\"foo\": 1}'",
    ),
    refused(
        "a tokenizer of the teacher that is not there",
        "teacher_tokenizer_name_or_path must be a folder",
        "--use_uld_loss --teacher_tokenizer_name_or_path {}/none",
    ),
    refused("an empty folder's name", "output_dir must be a folder, got ''", "--output_dir ''"),
    refused(
        "a dataset of a hub that cannot be reached",
        "dataset nobody/none: no such file or folder",
        "--dataset_name nobody/none",
    ),
    refused(
        "dispatched batches",
        "must not set dispatch_batches",
        "--accelerator_config '{\"dispatch_batches\": true}'",
    ),
    refused(
        "a config of accelerate that is not there",
        "accelerator_config must be",
        "--accelerator_config none.json",
    ),
    refused(
        "metrics that need logits",
        "include_for_metrics must be empty",
        "--include_for_metrics inputs",
    ),
    refused(
        "a checkpoint that is not there",
        "must be a checkpoint's folder",
        "--resume_from_checkpoint {}/run/checkpoint-9",
    ),
    refused(
        "nothing to resume from", "needs a complete checkpoint", "--resume_from_checkpoint true"
    ),
    done("resume where there is something", "--resume_from_checkpoint auto"),
    done("resume false", "--resume_from_checkpoint false"),
    refused(
        "checkpoints of an earlier run",
        "overwrite_output_dir=True deletes them",
        "--save_strategy steps --output_dir {}/earlier",
    ),
    refused("a run in the folder of another", "process 5 on far", "--output_dir {}/locked"),
    refused("a folder that is a file", "output_dir must be a folder", "--output_dir {}/rows.jsonl"),
    refused(
        "evaluation of the rows that are trained on",
        "eval_dataset_name",
        "--eval_strategy steps --eval_steps 1",
    ),
    done(
        "evaluation of another file",
        "--eval_strategy steps --eval_steps 1 --eval_dataset_name {}/rows.jsonl",
        says="eval_loss",
    ),
    done(
        "evaluation of a slice",
        "--eval_strategy steps --eval_steps 1 --dataset_test_split 'train[2:]'",
        says="eval_loss",
    ),
    done(
        "an evaluation before the first step",
        "--eval_on_start --eval_dataset_name {}/rows.jsonl",
        says="eval_loss",
    ),
    refused(
        "rows to evaluate on and no evaluation",
        "nothing evaluates on it: set eval_strategy",
        "--eval_dataset_name {}/rows.jsonl",
    ),
    refused(
        "the best model without evaluation",
        "load_best_model_at_end",
        "--save_strategy steps --load_best_model_at_end",
    ),
]
LOSSES = [
    done("beta 0", "--beta 0"),
    done("beta 1", "--beta 1"),
    done("beta 1e-6", "--beta 1e-6"),
    done("beta 0.999999999", "--beta 0.999999999"),
    done("the loss skew_kl", "--loss skew_kl"),
    done("the loss skew_reverse_kl", "--loss skew_reverse_kl"),
    done("the loss total_variation", "--loss total_variation"),
    done("numbers of a loss", "--loss skew_kl --loss_kwargs '{\"alpha\": 0.2}'"),
    done("cross-entropy alone", "--distillation_weight 0 --crossentropy_weight 1"),
    done("a high temperature", "--loss_temperature 1000"),
    done("a low temperature", "--loss_temperature 0.001"),
    done("rows one by one", "--chunk_size 1"),
    done("the least memory", "--loss_budget_mib 0.001"),
    done("the fast mode", "--logits_dtype bfloat16"),
    refused("a loss that there is not", "loss must be one of jsd", "--loss kl"),
    refused("a number of no loss", "they are none", "--loss_kwargs '{\"alpha\": 1}'"),
    refused("a beta of a loss that has none", "beta must be left out", "--loss skew_kl --beta 0"),
    refused(
        "two ways to weigh across tokenizers",
        "uld_crossentropy_weight",
        "--use_uld_loss --crossentropy_weight 1",
    ),
    refused("a field of the loss across tokenizers", "set use_uld_loss", "--uld_use_hybrid_loss"),
]
FIRST = [
    done("rollouts of the student", "--lmbda 1", says="100% of micro-batches"),
    done("what the teacher writes", "--seq_kd", says="the teacher writes the completions"),
    done("several completions of a prompt", "--lmbda 1 --num_generations 2"),
    refused(
        "completions that do not fit a batch", "num_generations must divide", "--num_generations 3"
    ),
    done("a slice of the rows", "--dataset_train_split 'train[:2]'", says="2 rows; "),
    refused(
        "a split that there is not",
        "the split 'train', got 'nonsense'",
        "--dataset_train_split nonsense",
    ),
    refused("an empty slice", "has no rows", "--dataset_train_split 'train[:0]'"),
    refused("a slice that is none", "train", "--dataset_train_split 'train[2'"),
    refused("a dataset that is not there", "no such file", "--dataset_name {}/none.jsonl"),
    refused("a format that nobody reads", "unknown format '.txt'", "--dataset_name {}/notes.txt"),
    refused("a csv file without a header", "must name the columns", "--dataset_name {}/bad.csv"),
    refused(
        "a file that is not UTF-8",
        "latin.jsonl: text in UTF-8 is expected, got byte 0xe9",
        "--dataset_name {}/latin.jsonl",
    ),
    done("a stream", "--dataset_streaming", says="a stream of rows"),
    refused(
        "a stream without an end", "max_steps must be set", "--dataset_streaming --max_steps -1"
    ),
    refused(
        "a stream read twice",
        "num_generations must be 1",
        "--dataset_streaming --num_generations 2",
    ),
    refused(
        "a logger that is not installed",
        "report_to needs the package of comet_ml",
        "--report_to comet_ml",
    ),
    refused("a logger that there is not", "nologger", "--report_to nologger"),
    refused("a flag of another trainer", "did you mean padding_free?", "--packing"),
    refused("a multiple of lengths", "padded to the longest", "--pad_to_multiple_of 8"),
    refused("a flag without its value", "expected one argument", "--beta"),
    refused("a word among the flags", "the YAML file comes before the flags", "late.yaml"),
    done("a flag twice: the last one wins", "--beta 7 --beta 0.5"),
    done("a learning rate that moves nothing", "--learning_rate 1e-7"),
    done("more rows in a batch than there are", "--per_device_train_batch_size 16"),
    done("epochs in place of steps", "--max_steps -1 --num_train_epochs 1"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "earlier" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / NAME).write_text(json.dumps({"pid": 5, "host": "far", "since": "then"}))
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "bad.csv").write_text("a,a\n1,2\n")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(CHAT).encode() + b'\n{"a": "\xe9"}')
    return tmp_path


@pytest.mark.parametrize("case", [*MODELS, *RUNS, *LOSSES, *FIRST], ids=lambda case: case.name)
def test_a_run_is_done_or_refused_in_one_sentence(case, models, folder, capfd):
    walk(case, models, folder, capfd)

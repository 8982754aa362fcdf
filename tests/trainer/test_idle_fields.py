"""Fields that nothing would read, or that fail in the first step: refused before models load."""

import pytest

from gold_trainer import GOLDConfig, GOLDTrainer
from gold_trainer.fields.library_options import check_library_options
from gold_trainer.fields.run import naming_the_launcher
from support.tiny_models import tiny_rows
from support.trainer_cases import losses_of, make_trainer


def config(tmp_path, **fields):
    return GOLDConfig(output_dir=str(tmp_path / "run"), use_cpu=True, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"optim": "adamw_torch", "optim_args": "beta1=0.8"},
            "reads, which is nothing, got 'beta1'",
        ),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "got 'momentun'; did you mean momentum"),
        ({"optim": "sgd", "optim_args": "momentum"}, "must be name=value, .* got 'momentum'"),
        ({"optim": "sgd", "optim_args": '{"momentum": 0.9}'}, "write momentum=0.9,nesterov=true"),
        ({"optim": "sgd", "optim_args": "momentum=x"}, r"values that 'sgd' takes.*\(could not"),
        ({"optim": "sgd", "optim_args": "nesterov=true"}, "Nesterov momentum requires a momentum"),
        ({"optim_target_modules": ["attn"]}, "optim_target_modules must be left out with optim="),
        (
            {"lr_scheduler_type": "constant", "warmup_steps": 20},
            "has no warm-up, got 20; set 0, or lr_scheduler_type='constant_with_warmup'",
        ),
        (
            {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "warmup_steps": 0.1,
                "eval_strategy": "epoch",
            },
            "warmup_steps must be 0 with lr_scheduler_type='reduce_lr_on_plateau', which has no",
        ),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "'warmup_stable_decay' takes, got {}"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "One of min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_type": "polynomial"}, "lr_end .* must be smaller than initial lr"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "x"}},
            "schedule 'cosine_with_min_lr' takes, got {'min_lr': 'x'}",
        ),
        ({"model_init_kwargs": {"dtype": "bf16"}}, "as dtype, got 'bf16'; did you mean bfloat16"),
        ({"teacher_model_init_kwargs": {"torch_dtype": "nn"}}, "as torch_dtype, got 'nn'"),
        (
            {"generation_kwargs": {"no_repeat_ngram_size": "2"}},
            "a value of int for no_repeat_ngram_size, got '2'",
        ),
        ({"generation_kwargs": {"min_length": True}}, "a value of int for min_length, got True"),
        ({"generation_kwargs": {"remove_invalid_values": 1}}, "a value of bool for remove_inv"),
        *(
            ({"generation_kwargs": {name: value}}, f"generate.* takes for {name}, got .*; mend it")
            for name, value in {
                "min_length": -1,
                "no_repeat_ngram_size": -2,
                "bad_words_ids": ["a"],
                "sequence_bias": {"a": 1.0},
                "exponential_decay_length_penalty": [1],
                "begin_suppress_tokens": ["a"],
                "forced_eos_token_id": -1,
                "encoder_repetition_penalty": 0.0,
            }.items()
        ),
        (
            {"generation_kwargs": {"min_new_tokens": 9}, "max_completion_length": 8},
            "at most max_completion_length=8 for min_new_tokens, got 9",
        ),
    ],
)
def test_what_a_library_would_not_read_or_not_take_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=f"^GOLDTrainer: .*{message}"):
        check_library_options(config(tmp_path, **fields))


def test_what_a_library_reads_passes(tmp_path):
    fields = {"optim": "sgd", "optim_args": "momentum = 0.9, nesterov=true", "learning_rate": 1e-3}
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}}
    kwargs = {"model_init_kwargs": {"dtype": "torch.bfloat16"}}
    args = config(tmp_path, **fields, **schedule, **kwargs)
    check_library_options(args)
    assert args.model_init_kwargs == {"dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "nothing would be saved"),
        ({"dataloader_persistent_workers": True}, "must be False without workers"),
        ({"dataloader_prefetch_factor": 2}, "must be None without workers, got 2"),
        (
            {"dataloader_multiprocessing_context": "spawn"},
            "must be None without workers, got 'spawn' .*; set dataloader_num_workers",
        ),
        ({"fp16_full_eval": True}, "fp16_full_eval must be False, .* would stay in 16 bits"),
        ({"bf16_full_eval": True}, "bf16_full_eval must be False, got True"),
        ({"neftune_noise_alpha": -1}, "neftune_noise_alpha must be None or finite and not neg"),
        (
            {"accelerator_config": {"split_batches": True}},
            "must not set split_batches, got True; a step would have the rows of one device",
        ),
        (
            {"accelerator_config": '{"even_batches": false}'},
            "must not set even_batches, got False; .* would have the others wait for it: leave",
        ),
        ({"length_column_name": "len"}, "length_column_name must be length, got len"),
        ({"use_cache": True}, "use_cache must be False"),
        ({"average_tokens_across_devices": False}, "a mean over the tokens of all devices"),
        ({"parallelism_config": {"tp_size": 2}}, "must be a ParallelismConfig of accelerate"),
        ({"fsdp_config": {"version": 2}}, "fsdp_config must be left out without fsdp, got {'vers"),
        ({"fsdp": False, "fsdp_config": '{"version": 2}'}, "and fsdp=False, with which nothing"),
        (
            {"fsdp": True, "fsdp_config": {"wrap_policy": "x"}},
            "got 'wrap_policy', which nothing rea",
        ),
        (
            {"fsdp": "full_shard", "fsdp_config": '{"fsdp_reshard_after_foward": true}'},
            "got 'fsdp_reshard_after_foward', .*did you mean reshard_after_forward",
        ),
        ({"deepspeed": {}}, "deepspeed must hold a configuration, got {}, with which it is off"),
        ({"liger_kernel_config": {"rope": True}}, "liger_kernel_config must be None, got {'rope'"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
            "must not set num_steps, got 2; set gradient_accumulation_steps",
        ),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each": True}}},
            "must hold adjust_scheduler, .*, got 'sync_each'; did you mean sync_each_batch",
        ),
        (
            {"accelerator_config": {"even_batches": "false"}},
            "even_batches of accelerator_config must be True or False, got 'false'; write it with",
        ),
    ],
)
def test_what_would_be_ignored_or_fail_later_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=f"^GOLDConfig: .*{message}"):
        config(tmp_path, **fields)


@pytest.mark.parametrize(
    ("name", "is_file", "message"),
    [
        ("checkpoint-1", True, "room for checkpoints, got .*, where checkpoint-1 is no folder; mo"),
        ("checkpoint-20", True, "where checkpoint-20 is no folder"),
        ("README.md", False, "room for README.md, got .*, where that is a folder"),
        ("model.safetensors", False, "room for model.safetensors, got"),
        (".running.json", False, "room for .running.json, got"),
    ],
)
def test_what_stands_in_the_way_of_what_is_saved_is_refused(name, is_file, message, tmp_path):
    there = tmp_path / "run" / name
    there.parent.mkdir()
    there.write_text("x") if is_file else there.mkdir()
    with pytest.raises(ValueError, match=f"^GOLDConfig: output_dir must have .*{message}"):
        config(tmp_path)
    there.unlink() if is_file else there.rmdir()
    (there.parent / "checkpoint-best").write_text("x")  # in nobody's way
    config(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        "Default process group has not been initialized, please make sure to call it.",
        "Using fsdp only works in distributed training.",
        "Error initializing torch.distributed: environment variable RANK expected, but not set",
    ],
)
def test_a_process_without_a_launcher_is_told_of_it(words):
    told = r"no launcher has started .* with accelerate launch or"
    with pytest.raises(ValueError, match=told), naming_the_launcher():
        raise ValueError(words)
    with pytest.raises(ValueError, match=r"^another$"), naming_the_launcher():
        raise ValueError("another")


def test_fsdp_without_a_launcher_is_refused_before_models_load(tmp_path):
    args = config(tmp_path, fsdp=True)
    with pytest.raises(ValueError, match=r"^GOLDTrainer: fsdp must be left out .* launcher has"):
        GOLDTrainer(model="no/model", teacher_model="no/teacher", args=args, train_dataset=[{}])


def test_no_reports_may_be_written_as_none(tmp_path):
    assert config(tmp_path, report_to=None).report_to == []


def test_rows_that_fill_no_batch_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, tiny_rows(3), "qwen3", dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"must be False .* got True and 3 rows for 4; leave it"):
        trainer.train()
    trainer.args.dataloader_drop_last = False
    trainer.train()
    assert len(losses_of(trainer)) == 1
    fields = {"dataloader_drop_last": True, "num_generations": 2, "max_steps": 1}
    make_trainer(tmp_path / "repeated", tiny_rows(3), "qwen3", **fields).train()  # 6 rows for 4


def test_a_crossentropy_of_rollouts_alone_is_told_to_have_no_effect(tmp_path, caplog):
    told = "crossentropy_weight=0.5 has no effect in training with lmbda=1.0"
    make_trainer(tmp_path, tiny_rows(4), "qwen3", crossentropy_weight=0.5, lmbda=0.5)
    assert told not in caplog.text
    make_trainer(tmp_path, tiny_rows(4), "qwen3", crossentropy_weight=0.5, lmbda=1.0)
    assert told in caplog.text

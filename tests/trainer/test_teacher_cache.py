"""Training from a cache of the teacher is training with the teacher, whose weights are away."""

import json
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig

from gold_trainer.__main__ import main
from gold_trainer.caching.facts import facts_of_processor
from support import logit_forms
from support.cache_cases import Pair, assert_same_runs, run_of, save_pair, save_rows
from support.tiny_models import FAMILIES, tiny, tiny_processor

PAIRS = {"one": ("qwen3_vl",), "two": ("lfm2_vl", "qwen3_vl"), "text": ("qwen3",)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each pair with a cache in float32."""
    made: dict[str, Pair] = {}

    def get(name):
        if name not in made:
            made[name] = save_pair(tmp_path_factory.mktemp(name), *PAIRS[name])
            made[name].cache()
        return made[name]

    return get


@contextmanager
def without_weights(pair):
    """What is read of the teacher in here would fail."""
    away = pair.folder / "weights of the teacher"
    pair.weights.rename(away)
    try:
        yield
    finally:
        away.rename(pair.weights)


@pytest.mark.parametrize("name", ["one", "two"])
def test_losses_gradients_and_evaluation_are_those_of_the_live_teacher(name, pairs, tmp_path):
    pair = pairs(name)
    options = {
        "max_steps": 4,  # into the second epoch
        "train_sampling_strategy": "random",
        "dataloader_num_workers": 2,
        "eval_rows": pair.rows[:3],
        "eval_strategy": "steps",
        "eval_steps": 4,
    }
    live = run_of(pair, tmp_path / "live", **options)
    with without_weights(pair):
        cached = run_of(
            pair, tmp_path / "cached", teacher_cache=str(pair.folder / "cache"), **options
        )
    assert_same_runs(cached, live)
    for key in ("eval_loss", "eval_completion_length"):
        ours, truth = (
            [e[key] for e in run[2].state.log_history if key in e] for run in (cached, live)
        )
        assert ours == pytest.approx(truth, rel=1e-5) and len(truth) == 1
    assert cached[2].teacher_model is None


def test_an_adapter_and_every_turn_of_a_conversation(tmp_path):
    pair = save_pair(tmp_path, "qwen3")
    turns = [
        [
            {"role": role, "content": f"{word} {i}"}
            for i in range(n)
            for role, word in (("user", "Say"), ("assistant", "It is"))
        ]
        for n in (1, 3, 2)
    ]
    rows = [{"messages": messages} for messages in turns]
    save_rows(tmp_path / "rows.jsonl", rows)
    options = {
        "train_on": "all",
        "max_steps": 3,
        "rows": rows,
        "peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }
    live = run_of(pair, tmp_path / "live", **options)
    cache = pair.cache(train_on="all")
    cached = run_of(pair, tmp_path / "cached", teacher_cache=str(cache), **options)
    assert_same_runs(cached, live)


def test_a_teacher_in_16_bits_is_kept_exactly(tmp_path):
    pair = save_pair(tmp_path, "qwen3")
    kwargs = {"dtype": "bfloat16"}
    fields = {"per_device_train_batch_size": 1, "max_steps": 3}
    live = run_of(pair, tmp_path / "live", teacher_model_init_kwargs=kwargs, **fields)
    cache = pair.cache(
        "cache",
        "--cache_dtype=auto",
        per_device_train_batch_size=1,
        teacher_model_init_kwargs=json.dumps(kwargs),
    )
    assert json.loads((cache / "cache.json").read_text())["dtype"] == "bfloat16"
    fields |= {"teacher_cache": str(cache), "teacher_model_init_kwargs": kwargs}
    cached = run_of(pair, tmp_path / "cached", **fields)
    assert cached[0] == live[0]
    for ours, truth in zip(cached[1].steps, live[1].steps, strict=True):
        assert all(torch.equal(ours[name], truth[name]) for name in truth)


def test_rounding_a_float32_teacher_to_16_bits_moves_loss_and_gradient_a_little(pairs, tmp_path):
    pair, cache = pairs("text"), tmp_path / "rounded"
    assert main(["cache-teacher", *pair.command(teacher_cache=cache)]) == 0
    live = run_of(pair, tmp_path / "live", beta=0.0)
    cached = run_of(pair, tmp_path / "cached", teacher_cache=str(cache), beta=0.0)
    assert cached[0] != live[0] and cached[0] == pytest.approx(live[0], rel=1e-4)
    for ours, truth in zip(cached[1].steps, live[1].steps, strict=True):
        moved = sum((ours[name] - truth[name]).square().sum() for name in truth)
        assert moved.sqrt() < 2e-3 * sum(g.square().sum() for g in truth.values()).sqrt()


def test_the_form_of_the_teachers_logits_is_kept(tmp_path):
    pair = save_pair(tmp_path, "llama", models=logit_forms.pair("Gemma2"))
    live = run_of(pair, tmp_path / "live")
    cached = run_of(pair, tmp_path / "cached", teacher_cache=str(pair.cache()))
    assert_same_runs(cached, live)


def test_a_resumed_run_goes_on_from_the_cache(pairs, tmp_path):
    pair = pairs("text")
    options = {
        "teacher_cache": str(pair.folder / "cache"),
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = run_of(pair, tmp_path / "whole", max_steps=4, **options)
    run_of(pair, tmp_path / "parts", max_steps=2, **options)
    rest = run_of(pair, tmp_path / "parts", max_steps=4, resume=True, **options)
    assert rest[0][-2:] == whole[0][-2:]


def test_the_command_line_trains_from_a_cache_that_it_has_made(pairs, capsys, tmp_path):
    """Rows of evaluation are cached too, and rows that are left out are not."""
    pair, cache = pairs("text"), tmp_path / "cache"
    save_rows(tmp_path / "eval.jsonl", pair.rows[4:])
    lines = (pair.folder / "rows.jsonl").read_text().splitlines()[:4]
    bad = json.dumps({"messages": [{"role": "user", "content": "nobody answers"}]})
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, bad]) + "\n")
    fields = {
        "dataset_name": tmp_path / "train.jsonl",
        "eval_dataset_name": tmp_path / "eval.jsonl",
        "eval_strategy": "steps",
        "max_steps": 3,
        "on_bad_row": "skip",
        "teacher_cache": cache,
    }
    assert main(["check", *pair.command(**fields)]) == 1  # the bad row; before there is a cache
    capsys.readouterr()
    assert main(["cache-teacher", *pair.command(**fields)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"teacher cache {cache}: 4 of train, 2 of eval examples, ")
    assert lines[1].startswith("to write: ") and lines[1].endswith(" are free")
    assert lines[-1] == f"teacher cache {cache} is complete"
    # no teacher is named: config and processor are in the cache
    fields |= {"teacher_model_name_or_path": None, "output_dir": tmp_path / "run"}
    assert main(["train", *pair.command(**fields)]) == 0
    out = capsys.readouterr().out
    assert f"teacher    cached in {cache}" in out
    assert f"student saved in {tmp_path / 'run'}" in out and "'eval_loss': " in out
    assert main(["check", *pair.command(**fields)]) == 1


def test_rows_that_are_new_are_added_and_the_others_are_not_run_again(tmp_path, monkeypatch):
    pair = save_pair(tmp_path, "qwen3")
    save_rows(tmp_path / "rows.jsonl", pair.rows[:4])
    cache = pair.cache()
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("rows-*")}
    save_rows(tmp_path / "rows.jsonl", pair.rows)
    pair.cache()
    after = {path.name: path.stat().st_mtime_ns for path in cache.glob("rows-*")}
    assert after.items() > before.items() and len(after) == 2 * len(before)
    monkeypatch.setattr("gold_trainer.caching.run.make_live_teacher", None)  # would raise
    pair.cache()
    run_of(pair, tmp_path / "run", teacher_cache=str(cache), max_steps=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_that_was_saved_and_loaded_has_the_same_facts(family, tmp_path):
    processor = tiny_processor(family)
    before = facts_of_processor(processor)
    processor.save_pretrained(tmp_path)
    again = type(processor).from_pretrained(tmp_path)
    again(text=["a", "a b c"], padding=True)
    assert facts_of_processor(again) == before
    other = tiny(family, num_merges=40)[1]
    assert facts_of_processor(other)["tokenizer"] != before["tokenizer"]

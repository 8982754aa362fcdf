"""The forward KL of a frozen head from a cache of its means: the loss of the live teacher."""

import json

import pytest
from peft import LoraConfig

from gold_trainer.__main__ import main
from support import logit_forms
from support.cache_cases import run_of, save_pair
from support.trainer_cases import assert_equal_gradients

LORA = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
FIELDS = {"beta": 0.0, "crossentropy_weight": 0.5, "loss_temperature": 0.8}
FLAGS = ("--use_peft", "--lora_target_modules", "q_proj")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pair = save_pair(tmp_path_factory.mktemp("pair"), "qwen3_vl")
    pair.cache("cache", *FLAGS, teacher_cache_form="head_means", **FIELDS)
    return pair


def train(pair, name, **options):
    return run_of(
        pair,
        pair.folder / name,
        **{"peft_config": LoraConfig(**LORA), **FIELDS, **options},
    )


def refusal(pair, **options):
    with pytest.raises(ValueError) as caught:
        train(pair, "run", **{"teacher_cache": str(pair.folder / "cache"), **options})
    return " ".join(str(caught.value).split())


def test_losses_gradients_and_logs_are_those_of_the_live_teacher(made):
    options = {
        "max_steps": 3,
        "eval_rows": made.rows[:3],
        "eval_strategy": "steps",
        "eval_steps": 3,
        "teacher_model_init_kwargs": None,
        "token_weighting": "support.weightings:graded",
    }
    live = train(made, "live", **options)
    made.weights.rename(made.folder / "away")  # nothing of the teacher is read, its head neither
    cached = train(made, "cached", teacher_cache=str(made.folder / "cache"), **options)
    (made.folder / "away").rename(made.weights)
    assert cached[0] == pytest.approx(live[0], rel=1e-5)
    for ours, truth in zip(cached[1].steps, live[1].steps, strict=True):
        assert_equal_gradients(ours, truth, 1e-4)
    logs = [
        {k: v for entry in run[2].state.log_history for k, v in entry.items()}
        for run in (cached, live)
    ]
    names = ("forward_kl", "teacher_entropy", "top1_agreement", "crossentropy", "jsd_loss")
    for name in (*names, "eval_loss", "eval_forward_kl", "token_weight"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4), name
    assert "reverse_kl" in logs[1] and "reverse_kl" not in logs[0]


def test_the_folder_holds_float32_and_no_head(made):
    manifest = json.loads((made.folder / "cache" / "cache.json").read_text())
    assert (manifest["form"], manifest["dtype"]) == ("head_means", "float32")
    assert (made.folder / "cache" / "head.safetensors").stat().st_size < 100


def test_autocast_takes_the_head_as_it_computes(made):
    made.cache("cache_bf16", *FLAGS, "--bf16", teacher_cache_form="head_means", **FIELDS)
    live = train(made, "live_bf16", max_steps=2, bf16=True)
    cache = str(made.folder / "cache_bf16")
    cached = train(made, "cached_bf16", max_steps=2, bf16=True, teacher_cache=cache)
    assert cached[0] == pytest.approx(live[0], rel=1e-4)
    for ours, truth in zip(cached[1].steps, live[1].steps, strict=True):
        assert_equal_gradients(ours, truth, 2e-2)
    assert "was made with precision bf16, this run has no" in refusal(made, teacher_cache=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.5}, "the loss must be the forward KL, loss='jsd' and beta=0, where teacher_c"),
        (
            {"loss": "skew_kl", "beta": 0.5},
            "where teacher_cache has head_means, got loss='skew_kl'",
        ),
        (
            {"peft_config": None},
            "the student's lm_head must be frozen where teacher_cache has head_m",
        ),
        (
            {"peft_config": LoraConfig(**LORA, modules_to_save=["lm_head"])},
            "the student's lm_head must be frozen where teacher_cache has head_means, got one that",
        ),
        (
            {"loss_temperature": 1.0},
            "was made with teacher_temperature 0.8, this run has 1.0: loss_",
        ),
        (
            {"logits_dtype": "bfloat16"},
            "logits_dtype must be 'float32' where teacher_cache has hea",
        ),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "was made with student_head"),
        (
            {"teacher_cache_form": "hidden"},
            "holds teacher_cache_form=head_means, this run asks for",
        ),
    ],
)
def test_what_means_cannot_do_is_refused(made, options, message):
    told = refusal(made, **options)
    assert message in told and told.endswith(".")


def test_the_student_may_have_another_temperature_than_the_teacher(made):
    options = {"loss_temperature": 0.6, "loss_teacher_temperature": 0.8}
    live = train(made, "live_pair", **options)
    cached = train(made, "cached_pair", teacher_cache=str(made.folder / "cache"), **options)
    assert cached[0] == pytest.approx(live[0], rel=1e-5)


def test_the_command_refuses_a_head_that_is_trained(made, capsys):
    fields = {"teacher_cache": made.folder / "other", "teacher_cache_form": "head_means"}
    assert main(["cache-teacher", *made.command(**fields, **FIELDS)]) == 2
    told = capsys.readouterr().err
    assert (
        "error: GOLDTrainer: the student's lm_head must be frozen where teacher_cache has" in told
    )


def test_logits_that_are_scaled_are_taken_and_a_softcap_of_the_student_is_refused(tmp_path, capsys):
    fields = {"teacher_cache_form": "head_means", "beta": 0.0}
    pair = save_pair(tmp_path / "scale", "llama", models=logit_forms.pair("Cohere"))
    cache = pair.cache("cache", *FLAGS, **fields)
    live = train(pair, "live", beta=0.0, crossentropy_weight=0.0, loss_temperature=1.0)
    options = {"beta": 0.0, "crossentropy_weight": 0.0, "loss_temperature": 1.0}
    cached = train(pair, "cached", teacher_cache=str(cache), **options)
    assert cached[0] == pytest.approx(live[0], rel=1e-5)
    pair = save_pair(tmp_path / "cap", "llama", models=logit_forms.pair("Gemma2"))
    argv = pair.command(*FLAGS, teacher_cache=tmp_path / "cache", **fields)
    assert main(["cache-teacher", *argv]) == 2
    told = capsys.readouterr().err
    assert "must have no softcap where teacher_cache has head_means, got final_logit_softc" in told

"""loss_top_k: the generalized JSD of the k likeliest tokens of a teacher that is here, and all
others.
"""

import pytest

from gold_kernels.reference import top_k_rows
from gold_trainer import GOLDConfig
from support.eager_step import completion_of, eager_step
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import (
    GradientRecorder,
    assert_equal_gradients,
    losses_of,
    make_trainer,
)

ROWS = tiny_rows(4, images="mixed")
LENGTH = {"max_completion_length": 64}


def step(tmp_path, family="qwen3_vl", rows=ROWS, **fields):
    recorder = GradientRecorder()
    trainer = make_trainer(tmp_path, rows, family, callbacks=[recorder], **(LENGTH | fields))
    trainer.train()
    return trainer, recorder.gradients


def of_float64(k, beta, temperatures, weights):
    """The same from full logits, in float64."""

    def row_loss(student_logits, teacher_logits):
        log_probs, ids = (teacher_logits / temperatures[1]).log_softmax(-1).topk(k, -1)
        options = {"beta": beta, "temperature": temperatures[0]}
        return top_k_rows(student_logits, ids, log_probs, **options)

    (student, processor), (teacher, _) = tiny("qwen3_vl"), tiny("qwen3_vl", "teacher")
    completions = [completion_of("qwen3_vl", processor, row) for row in ROWS]
    return eager_step(
        *(student, teacher, processor, ROWS, completions), row_loss=row_loss, weights=weights
    )


@pytest.mark.parametrize(
    ("k", "beta", "temperatures", "weights"),
    [
        (8, 0.0, (1.0, 1.0), (1.0, 0.0)),
        (3, 0.5, (0.8, 1.3), (0.5, 0.3)),
        (1, 1.0, (1.0, 1.0), (1.0, 0.0)),
    ],
)
def test_loss_and_gradients_are_those_of_full_logits_in_float64(
    k, beta, temperatures, weights, tmp_path
):
    fields = {"loss_temperature": temperatures[0], "loss_teacher_temperature": temperatures[1]}
    fields |= {"distillation_weight": weights[0], "crossentropy_weight": weights[1]}
    fields |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer, gradients = step(tmp_path, loss_top_k=k, beta=beta, loss_budget_mib=0.05, **fields)
    expected = of_float64(k, beta, temperatures, weights)
    assert losses_of(trainer)[0] == pytest.approx(expected[0], rel=1e-5)
    gradients = {name: gradients[name].double() for name in expected[1]}
    assert_equal_gradients(gradients, expected[1], relative=1e-4)


def test_all_tokens_are_the_generalized_jsd(tmp_path):
    vocabulary = tiny("qwen3")[0].get_output_embeddings().out_features
    rows = tiny_rows(4, images=0)
    for beta in (0.0, 0.5):
        whole, expected = step(tmp_path, "qwen3", rows, beta=beta)
        trainer, gradients = step(tmp_path, "qwen3", rows, beta=beta, loss_top_k=vocabulary)
        assert losses_of(trainer) == pytest.approx(losses_of(whole), rel=1e-5)
        assert_equal_gradients(gradients, expected, relative=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path):
    teacher = tiny("qwen3")[0]
    fields = {"teacher": teacher, "loss_top_k": 8, "beta": 0.0}
    trainer, gradients = step(tmp_path, "qwen3", tiny_rows(4, images=0), **fields)
    assert abs(losses_of(trainer)[0]) < 1e-7
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) < 1e-6


def test_what_is_logged_and_evaluated_is_known_of_k_tokens(tmp_path, capsys):
    rows = tiny_rows(4, images=0)
    fields = {"loss_top_k": 4, "crossentropy_weight": 0.5, "beta": 0.0, "eval_strategy": "steps"}
    trainer, _ = step(tmp_path, "qwen3", rows, eval_rows=rows, eval_steps=1, **fields)
    log = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    assert log["loss"] == pytest.approx(log["top_k_loss"] + 0.5 * log["crossentropy"], rel=1e-6)
    for name in ("student_top_mass", "teacher_top_mass"):
        assert 4 / 400 < log[name] < 1 and 0 < log[f"eval_{name}"] < 1
    unknown = {"forward_kl", "reverse_kl", "top1_agreement", "student_entropy", "jsd_loss"}
    assert not unknown & log.keys()
    assert "jsd of the teacher's 4 likeliest tokens" in capsys.readouterr().out
    fields |= {"metric_for_best_model": "eval_top1_agreement", "load_best_model_at_end": True}
    fields |= {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(ValueError, match=r"metric_for_best_model .*top_k_loss.*got .*top1_agreem"):
        step(tmp_path / "best", "qwen3", rows, eval_rows=rows, eval_steps=1, **fields)


def test_a_student_that_writes_learns_from_the_tokens_below_its_adapter(tmp_path):
    from peft import LoraConfig

    from gold_trainer import GOLDTrainer
    from support.trainer_cases import FIELDS

    student, processor = tiny("qwen3")
    adapter = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    trainer = GOLDTrainer(
        model=student,
        args=GOLDConfig(str(tmp_path), **(FIELDS | {"lmbda": 1.0, "loss_top_k": 5, "beta": 1.0})),
        train_dataset=tiny_rows(4, images=0),
        processing_class=processor,
        peft_config=LoraConfig(init_lora_weights=False, **adapter),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["on_policy_loss"] == log["loss"] > 0 and log["grad_norm"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_top_k": -1}, "loss_top_k must be at least 0, got -1; 0 compares all tokens"),
        ({"loss_top_k": 2.5}, "loss_top_k must be a whole number, at least 0, got 2.5; 0 compare"),
        ({"loss_top_k": None}, "loss_top_k must be a whole number, at least 0, got None; 0 comp"),
        (
            {"loss_top_k": 8, "loss": "skew_kl"},
            "loss must be 'jsd' with loss_top_k=8, got 'skew_kl'; leave one of the two out: the k",
        ),
        (
            {"loss_top_k": 8, "use_uld_loss": True},
            "loss_top_k must be 0 with use_uld_loss, got 8; set 0: the k tokens belong to one voc",
        ),
        (
            {"loss_top_k": 8, "teacher_cache": "c", "teacher_cache_form": "head_means", "beta": 0},
            "loss_top_k must be 0 where teacher_cache has head_means, got 8; leave it out, or make",
        ),
        (
            {"teacher_cache": "c", "teacher_cache_form": "top_k"},
            "loss_top_k must be at least 1 where teacher_cache has the teacher's top_k, got 0; set",
        ),
        (
            {"teacher_cache": "c", "teacher_cache_form": "top_k", "use_uld_loss": True},
            "use_uld_loss must be False where teacher_cache has the teacher's top_k, got True; the",
        ),
    ],
)
def test_what_the_loss_cannot_do_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        GOLDConfig(str(tmp_path / "run"), use_cpu=True, **({"lmbda": 0.0} | fields))
    told = str(caught.value)
    assert told.startswith(f"GOLDConfig: {message}") and told.endswith(".")
    assert not (tmp_path / "run").exists()


def test_more_tokens_than_there_are_are_refused(tmp_path):
    message = "GOLDTrainer: loss_top_k must be at most 384, the tokens of the vocabulary, got 385"
    with pytest.raises(ValueError, match=message):
        step(tmp_path, "qwen3", tiny_rows(4, images=0), loss_top_k=385)

"""The log says how far the writer's log-probabilities are from the learner's."""

import pytest
import torch

from gold_trainer import sampling_check
from gold_trainer.writers import Completion
from support.cross_cases import cross_trainer, make_sides, rows_of
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import make_trainer

MEAN, MAX = (f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max"))
ROWS = tiny_rows(4, images="mixed")
ON_POLICY = {"lmbda": 1.0, "max_steps": 2, "learning_rate": 0.5}


def logs_of(run):
    return [entry for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1.0, "top_p": 1.0},
        {"top_k": 20, "min_p": 0.01, "num_generations": 2},
        {"top_k": 1},
    ],
)
def test_a_writer_of_the_same_weights_samples_from_the_learners_distribution(fields, tmp_path):
    run = make_trainer(tmp_path, ROWS, **(ON_POLICY | fields))
    run.train()
    for entry in logs_of(run):
        assert 0 <= entry[MEAN] <= entry[MAX] < 1e-3
    assert len(logs_of(run)) == 2 and (entry[MAX] > 0 or "top_k" in fields)


@pytest.mark.parametrize("fields", [{"neftune_noise_alpha": 300.0}, {"disable_dropout": False}])
def test_noise_that_the_learner_alone_has_is_logged_and_not_warned_of(fields, tmp_path, caplog):
    student = tiny("qwen3")[0]
    student.config.attention_dropout = 0.5
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.5
    run = make_trainer(tmp_path, tiny_rows(4), "qwen3", student=student, **(ON_POLICY | fields))
    run.train()
    assert logs_of(run)[0][MEAN] > sampling_check.LARGE
    assert "should be the student's own" not in caplog.text


def test_across_tokenizers_the_students_tokens_are_compared(tmp_path):
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    run, _ = cross_trainer(tmp_path, rows_of("lfm2_vl"), student, teacher, max_steps=1, lmbda=1.0)
    run.train()
    assert logs_of(run)[0][MAX] < 1e-3


def test_stale_weights_show_and_are_warned_of_once(tmp_path, caplog):
    """A writer that never renews what it got at the first step."""
    run = make_trainer(tmp_path, ROWS, **(ON_POLICY | {"max_steps": 4}))
    writer, fresh = run.rollouts.writers["student"], {}
    complete = writer.complete

    def stale(prompts, sampling):
        now = {name: value.clone() for name, value in run.model.state_dict().items()}
        fresh.update({name: value for name, value in now.items() if name not in fresh})
        run.model.load_state_dict(fresh)
        written = complete(prompts, sampling)
        run.model.load_state_dict(now)
        return written

    writer.complete = stale
    run.train()
    means = [entry[MEAN] for entry in logs_of(run)]
    assert means[0] < 1e-3 < sampling_check.LARGE < means[-1]
    told = [r.getMessage() for r in caplog.records if "log-probabilities" in r.getMessage()]
    assert len(told) == 1 and "other weights, other pictures or another prompt" in told[0]


@pytest.mark.parametrize(
    "fields",
    [{"lmbda": 0.0}, {"repetition_penalty": 1.1}, {"generation_kwargs": {"min_length": 1}}],
)
def test_what_cannot_be_compared_is_not_logged(fields, tmp_path):
    run = make_trainer(tmp_path, ROWS, **(ON_POLICY | {"max_steps": 1} | fields))
    run.train()
    assert MEAN not in logs_of(run)[0]


def test_a_micro_batch_shows_at_most_64_rows_of_logits(tmp_path, monkeypatch):
    sizes = []
    logprobs_of = sampling_check.logprobs_of

    def record(logits, *args):
        sizes.append(len(logits))
        return logprobs_of(logits, *args)

    monkeypatch.setattr(sampling_check, "logprobs_of", record)
    run = make_trainer(tmp_path, ROWS, **(ON_POLICY | {"max_completion_length": 40}))
    run.rollouts.writers["student"].complete = lambda prompts, sampling: [
        [Completion([5] * 40, [0.0] * 40, 0)] for _ in prompts
    ]
    run.train()
    assert sizes == [64, 64]
    assert logs_of(run)[0][MEAN] == pytest.approx(
        torch.tensor(run.model.config.text_config.vocab_size).log().item(), rel=0.2
    )

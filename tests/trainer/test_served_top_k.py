"""loss_top_k of a teacher that a vLLM server runs: its prompt_logprobs, and no hidden states."""

import shlex

import pytest

from gold_trainer import GOLDConfig
from gold_trainer.__main__ import main
from gold_trainer.caching.store import Manifest
from gold_trainer.writers.vllm.requests import GENERATE
from support.cache_cases import assert_same_runs, run_of, save_pair
from support.tiny_models import save_tiny
from support.trainer_cases import FIELDS as CONFIG

FIELDS = {"loss_top_k": 5, "beta": 0.5, "loss_temperature": 0.8, "loss_teacher_temperature": 1.0}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("texts"), "qwen3")


def with_one_token_more(served):
    served.entry["max_model_len"] = 257
    return FIELDS | served.fields


def test_a_run_learns_what_it_does_of_a_teacher_that_is_here(pictures, serve, tmp_path):
    options = {"max_steps": 2, "eval_rows": pictures.rows[:2], "eval_strategy": "steps"}
    live = run_of(pictures, tmp_path / "live", eval_steps=2, **FIELDS, **options)
    with serve(pictures, "qwen3_vl") as served:
        fields = with_one_token_more(served)
        ours = run_of(pictures, tmp_path / "served", eval_steps=2, **fields, **options)
        assert served.most_at_a_time == 2, "rows of a micro-batch are asked for together"
        assert {len(body.get("content_parts", [])) for body in served.rows} == {0, 1, 2}
        assert not [*served.folder.iterdir()], "no hidden states are asked for"
    assert_same_runs(ours, live, 1e-4)
    logs = [run[2].state.log_history for run in (ours, live)]
    (evaluated,), (expected,) = ([e for e in log if "eval_loss" in e] for log in logs)
    for name in ("eval_loss", "eval_teacher_top_mass"):
        assert evaluated[name] == pytest.approx(expected[name], rel=1e-5)


def test_the_student_may_write(texts, serve, tmp_path, caplog):
    options = {"lmbda": 1.0, "max_completion_length": 6, "per_device_train_batch_size": 3}
    live = run_of(texts, tmp_path / "live", **FIELDS, **options)
    with serve(texts, "qwen3") as served:
        served.entry["root"] = "elsewhere"
        ours = run_of(texts, tmp_path / "run", **with_one_token_more(served), **options)
    assert_same_runs(ours, live, 1e-4)
    told = [
        r.getMessage() for r in caplog.records if "was started with elsewhere" in r.getMessage()
    ]
    assert len(told) == 1 and "config and tokenizer are read from the latter" in told[0]


def test_a_cache_of_a_served_teacher_is_that_of_a_live_one(texts, serve, tmp_path, capsys):
    options = {"loss_top_k": 3}
    live = run_of(texts, tmp_path / "live", **(FIELDS | options))
    with serve(texts, "qwen3") as served:
        fields = with_one_token_more(served)
        cache = texts.cache("cache", **fields)
        assert main(["plan", *(w for w in texts.command(**fields) if "use_cpu" not in w)]) == 0
        assert ", in its server" in capsys.readouterr().out
        # hidden states, where they are wanted in spite of loss_top_k
        hidden = texts.cache("hidden", teacher_cache_form="hidden", **fields)
    assert [Manifest.read(folder).form for folder in (cache, hidden)] == ["top_k", "hidden"]
    for folder in (cache, hidden):
        ours = run_of(texts, tmp_path / "run", teacher_cache=str(folder), **(FIELDS | options))
        assert_same_runs(ours, live, 1e-4)


def test_several_teachers_may_be_here_and_there(texts, serve, tmp_path):
    save_tiny(tmp_path / "other", "qwen3", "teacher", seed=7)
    rows = [row | {"teacher_id": "ab"[i % 2]} for i, row in enumerate(texts.rows)]
    options = {"rows": rows, "teacher_model_name_or_path": None}
    here = {"a": str(texts.folder / "teacher"), "b": str(tmp_path / "other")}
    live = run_of(texts, tmp_path / "live", teacher_models=here, **FIELDS, **options)
    with serve(texts, "qwen3") as served:
        fields = with_one_token_more(served)
        url = fields.pop("teacher_model_server_url")
        mixed = here | {"a": url}
        ours = run_of(texts, tmp_path / "run", teacher_models=mixed, **fields, **options)
    assert_same_runs(ours, live, 1e-4)


def test_the_start_line_has_no_special_options(capsys, texts):
    fields = {"teacher_model_server_url": "http://127.0.0.1:8002", "loss_top_k": 64}
    assert main(["teacher-command", *texts.command(**fields)]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[words.index("--max-logprobs") + 1] == "64"
    assert words[words.index("--max-model-len") + 1] == "257"
    assert not {"--speculative-config", "--kv-transfer-config"} & set(words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_model_len": 256}, r"sequences of 257 tokens, one more than max_length, got --max-m"),
        ({"max_logprobs": 4}, r"give prompt_logprobs of loss_top_k=5 tokens, got a refusal .*400"),
        ({"answer": {"prompt_logprobs": [None, {}]}}, "token ids and prompt_logprobs, got .*None"),
        (
            {"answer": {"prompt_logprobs": [None, {"3": {"logprob": 0.0, "rank": 1}}]}},
            "answer .* with 5 prompt_logprobs of a token, got .*'rank': 1",
        ),
    ],
)
def test_servers_that_cannot_are_refused(change, message, texts, serve, tmp_path):
    with serve(texts, "qwen3") as served:
        fields = with_one_token_more(served)
        if "max_model_len" in change:
            served.entry.update(change)
        elif "answer" in change:
            number = 2 if "with" in message else 3
            ids = {"prompt_token_ids": list(range(number))}
            served.stub.answers[GENERATE] = lambda body: ids | change["answer"] if body else 400
        else:
            served.max_logprobs = change["max_logprobs"]
        with pytest.raises(ValueError, match=message) as caught:
            run_of(texts, tmp_path / "run", **fields)
    assert "start" in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_tokens_that_are_none_of_the_k_are_refused(texts, serve, tmp_path):
    with serve(texts, "qwen3") as served:
        fields = with_one_token_more(served)
        fields["token_weighting"] = "support.weightings:unsure"
        with pytest.raises(ValueError, match=r"must be known, got .* or a server's loss_top_k tok"):
            run_of(texts, tmp_path / "run", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"loss_temperature": 2.0},
            "loss_teacher_temperature, or loss_temperature without it, must be 1 where a server "
            "gives the tokens of loss_top_k, got 2.0",
        ),
        (
            {"token_weighting": "picture_detail"},
            "looks at pictures without detail too, got loss_top_k of a server; leave one",
        ),
    ],
)
@pytest.mark.parametrize(
    "teacher",
    [
        {"teacher_model_server_url": "http://a:1"},
        {"teacher_models": {"here": "folder", "there": "http://a:1"}},
    ],
)
def test_what_tokens_cannot_do_is_refused(teacher, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GOLDConfig(str(tmp_path / "run"), **(CONFIG | teacher | {"loss_top_k": 8} | fields))

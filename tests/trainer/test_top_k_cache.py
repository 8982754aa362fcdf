"""A cache of the teacher's k likeliest tokens: the live teacher's loss, in 8 k bytes a token."""

import json

import pytest

from gold_trainer.__main__ import main
from gold_trainer.caching.store import Manifest
from gold_trainer.teachers.cached import StoredRows
from support.cache_cases import assert_same_runs, run_of, save_pair, save_rows
from support.tiny_models import save_tiny

K = 6
FIELDS = {
    "loss_top_k": K,
    "beta": 0.5,
    "crossentropy_weight": 0.5,
    "loss_temperature": 0.8,
    "loss_teacher_temperature": 1.2,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    pair = save_pair(tmp_path_factory.mktemp("pictures"), "qwen3_vl")
    pair.cache(**FIELDS)
    return pair


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """With a cache of k tokens, and one of hidden states."""
    pair = save_pair(tmp_path_factory.mktemp("texts"), "qwen3")
    pair.cache(**FIELDS)
    pair.cache("hidden", teacher_cache_form="hidden", **FIELDS)
    return pair


def train(pair, name, **options):
    return run_of(pair, pair.folder / name, **(FIELDS | options))


def cached(pair, name="cached", cache="cache", **options):
    return train(pair, name, teacher_cache=str(pair.folder / cache), **options)


def refusal(pair, **options):
    with pytest.raises(ValueError) as caught:
        cached(pair, "run", **options)
    told = " ".join(str(caught.value).split())
    assert told.endswith(".")
    return told


def logged(run):
    return {k: v for entry in run[2].state.log_history for k, v in entry.items()}


def test_losses_gradients_and_logs_are_those_of_the_live_teacher(pictures):
    options = {
        "max_steps": 3,
        "eval_rows": pictures.rows[:3],
        "eval_strategy": "steps",
        "eval_steps": 3,
        "token_weighting": "support.weightings:graded",
    }
    live = train(pictures, "live", **options)
    pictures.weights.rename(pictures.folder / "away")  # nothing of the teacher is read
    ours = cached(pictures, **options)
    (pictures.folder / "away").rename(pictures.weights)
    assert_same_runs(ours, live, 1e-4)
    logs = [logged(run) for run in (ours, live)]
    names = ("student_top_mass", "teacher_top_mass", "crossentropy", "top_k_loss", "token_weight")
    for name in (*names, "eval_loss", "eval_teacher_top_mass"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-4), name
    assert logs[0].keys() == logs[1].keys()


def test_the_folder_has_8_k_bytes_a_token_and_no_head(texts):
    cache = texts.folder / "cache"
    manifest = Manifest.read(cache)
    assert (manifest.form, manifest.dtype, manifest.width) == ("top_k", "float32", 2 * K)
    assert (cache / "head.safetensors").stat().st_size < 100
    stored = StoredRows(cache, manifest)
    (shard,) = manifest.shards
    assert (
        0 <= (cache / f"{shard}.safetensors").stat().st_size - 8 * K * stored.index.num_rows < 200
    )
    log_probs, ids = stored._shard(0)[:].split(K, 1)
    assert bool((log_probs.diff(dim=1) <= 0).all()) and float(log_probs.exp().sum(1).max()) < 1
    assert bool((ids == ids.long()).all()) and 0 <= float(ids.min()) < float(ids.max()) < 384


def test_hidden_states_and_a_larger_k_give_the_loss_of_the_live_teacher_too(texts):
    options = {"loss_top_k": 3, "max_steps": 2}
    live = train(texts, "live", **options)
    for cache in ("cache", "hidden"):
        assert_same_runs(cached(texts, cache=cache, **options), live, 1e-4)


def test_weights_of_tokens_may_ask_what_hidden_states_tell(texts):
    options = {"token_weighting": "support.weightings:unsure"}
    assert_same_runs(
        cached(texts, cache="hidden", **options), train(texts, "live", **options), 1e-4
    )
    told = refusal(texts, **options)
    assert "got a teacher_cache of head_means or top_k, or a server" in told


def test_a_resumed_run_goes_on_from_the_cache(texts, caplog):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = cached(texts, "whole", max_steps=4, **options)
    cached(texts, "parts", max_steps=2, **options)
    rest = cached(texts, "parts", max_steps=4, resume=True, **options)
    assert rest[0][-2:] == whole[0][-2:]
    changed = {"loss_top_k": 4, "max_steps": 5}
    cached(texts, "parts", resume=True, **options, **changed)
    assert any("with other settings: loss_top_k 6 -> 4" in r.getMessage() for r in caplog.records)


def test_several_teachers_have_a_cache_each(tmp_path):
    pair = save_pair(tmp_path, "qwen3")
    for number, key in enumerate(("math", "code")):
        save_tiny(tmp_path / key, "qwen3", "teacher", seed=number + 3)
    rows = [row | {"teacher_id": ("math", "code")[i % 2]} for i, row in enumerate(pair.rows)]
    save_rows(tmp_path / "rows.jsonl", rows)
    models = {key: str(tmp_path / key) for key in ("math", "code")}
    options = {"teacher_model_name_or_path": None, "teacher_models": models, "rows": rows}
    options |= {"per_device_train_batch_size": 3, "max_steps": 2}
    live = train(pair, "live", **options)
    fields = {"teacher_models": json.dumps(models), "teacher_model_name_or_path": None}
    pair.cache(**FIELDS, **fields)
    assert Manifest.read(tmp_path / "cache" / "code").form == "top_k"
    ours = cached(pair, **options)
    assert_same_runs(ours, live, 1e-4)
    assert logged(ours)["loss/math"] == pytest.approx(logged(live)["loss/math"], rel=1e-5)
    with pytest.raises(ValueError, match="loss_top_k must be at most 6, the tokens that teacher_c"):
        cached(pair, "run", **options | {"loss_top_k": 7})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_top_k": 7}, "loss_top_k must be at most 6, the tokens that teacher_cache "),
        ({"loss_top_k": 0}, "loss_top_k must be at least 1 where teacher_cache has the teacher's"),
        (
            {"loss_teacher_temperature": 1.0},
            "was made with teacher_temperature 1.2, this run has 1.0: loss_teacher_temperature or",
        ),
        ({"teacher_cache_form": "hidden"}, "holds teacher_cache_form=top_k, this run asks for hid"),
        (
            {"token_weighting": "picture_detail"},
            "token_weighting='picture_detail' needs a teacher that looks at pictures without",
        ),
        ({"lmbda": 0.5}, "lmbda must be 0 with teacher_cache, got 0.5; nobody knows what the stud"),
    ],
)
def test_what_k_tokens_cannot_do_is_refused(texts, options, message):
    assert message in refusal(texts, **options)


def test_a_cache_of_another_vocabulary_is_refused(texts):
    """Heads that are padded otherwise: the teacher's probabilities would be others."""
    manifest = Manifest.read(texts.folder / "cache")
    manifest.facts["vocabulary"] = 380
    path = texts.folder / "cache" / "cache.json"
    before = path.read_text()
    path.write_text(json.dumps(vars(manifest)))
    told = refusal(texts)
    path.write_text(before)
    assert "was made with vocabulary 380, this run has 384: the heads of student and te" in told


def test_the_command_line_says_what_a_token_takes_and_refuses_another_k(texts, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    cache = texts.folder / "cache"
    argv = [word for word in texts.command(teacher_cache=cache, **FIELDS) if "cpu" not in word]
    assert main(["plan", *argv]) == 0
    assert f"from its cache, {8 * K} bytes a scored token" in capsys.readouterr().out
    assert main(["cache-teacher", *argv, "--use_cpu"]) == 0
    assert f"scored tokens, {8 * K} bytes each; " in capsys.readouterr().out
    assert main(["cache-teacher", *argv, "--use_cpu", "--loss_top_k=8"]) == 2
    assert (
        "was made with loss_top_k 6, this run has 8: set loss_top_k as" in capsys.readouterr().err
    )
    for form in ("top_k", "head_means"):
        given = [f"--teacher_cache_form={form}", "--cache_dtype=bfloat16", "--use_cpu"]
        given += ["--beta=0", f"--loss_top_k={K * (form == 'top_k')}"]
        assert main(["cache-teacher", *argv, *given]) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert f"cache_dtype must be float32 or auto with teacher_cache_form={form}, got" in told
    assert main(["check", *argv, "--use_cpu"]) == 0
    assert main(["check", *argv, "--use_cpu", "--loss_teacher_temperature=3"]) == 2
    assert "was made with teacher_temperature 1.2, this run has 3" in capsys.readouterr().err

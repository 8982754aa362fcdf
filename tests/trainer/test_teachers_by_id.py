"""Several teachers: the column teacher_id says which one a row learns from."""

import json
import re

import pytest
import torch
from datasets import Dataset

from gold_trainer import GOLDConfig, GOLDTrainer, loading
from gold_trainer.__main__ import main
from gold_trainer.data.columns import read_teacher_id
from gold_trainer.metrics import MetricWindow
from support.cache_cases import CACHE_FIELDS, save_pair, save_rows
from support.cross_cases import TEACHER_MERGES
from support.served_stub import served_teacher
from support.tiny_models import save_tiny, tiny
from support.trainer_cases import (
    FIELDS,
    GradientRecorder,
    assert_equal_gradients,
    losses_of,
)

IDS = ("math", "code")


def save_teachers(folder, family, student=None, **options):
    """A pair with two teachers of one tokenizer, and rows that name them in turns."""
    pair = save_pair(folder, student or family, family if student else None, count=5)
    for number, key in enumerate(IDS):
        save_tiny(folder / key, family, "teacher", seed=number + 3, **options)
    rows = [row | {"teacher_id": IDS[i % 2]} for i, row in enumerate(pair.rows)]
    save_rows(folder / "rows.jsonl", rows)
    return pair._replace(rows=rows)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return save_teachers(tmp_path_factory.mktemp("pictures"), "qwen3_vl")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return save_teachers(tmp_path_factory.mktemp("texts"), "qwen3")


@pytest.fixture(scope="module")
def across(tmp_path_factory):
    folder = tmp_path_factory.mktemp("across")
    return save_teachers(folder, "llama", "qwen3", num_merges=TEACHER_MERGES)


def models_of(pair):
    return {key: str(pair.folder / key) for key in IDS}


def run_of(pair, output_dir, rows, **fields):
    recorder = GradientRecorder()
    given = pair.fields | {"per_device_train_batch_size": len(rows), "max_steps": 1} | fields
    trainer = GOLDTrainer(
        model=str(pair.folder / "student"),
        train_dataset=rows,
        args=GOLDConfig(output_dir=str(output_dir), **given),
        callbacks=[recorder],
    )
    trainer.train()
    return trainer, recorder.gradients


def alone(pair, output_dir, key, **fields):
    """The rows of one teacher, in a run of it alone."""
    rows = [{k: v for k, v in row.items() if k != "teacher_id"} for row in pair.rows]
    rows = [row for row, own in zip(rows, pair.rows, strict=True) if own["teacher_id"] == key]
    return run_of(
        pair, output_dir, rows, teacher_model_name_or_path=str(pair.folder / key), **fields
    )


def assert_sum_of_runs(pair, tmp_path, counts, **fields):
    """One mean over all units: those of separate runs, weighed by how many each has."""
    together, gradients = run_of(
        pair, tmp_path, pair.rows, teacher_models=models_of(pair), **fields
    )
    counted = dict.fromkeys(IDS, 0)
    for part in counts:
        for key in IDS:
            counted[key] += part[f"units/{key}"]
    runs = {key: alone(pair, tmp_path / key, key, **fields) for key in IDS}
    log = together.state.log_history[0]
    assert log["loss/math"] != log["loss/code"], "precondition: the teachers differ"
    total = sum(counted.values())
    assert all(counted.values()) and counted["math"] != counted["code"], "precondition"
    expected = 0.0
    for key, (trainer, _) in runs.items():
        loss = losses_of(trainer)[0]
        assert log[f"loss/{key}"] == pytest.approx(loss, rel=1e-5)
        expected += counted[key] / total * loss
    assert log["loss"] == pytest.approx(expected, rel=1e-5)
    summed = {
        name: sum(counted[key] / total * runs[key][1][name] for key in IDS) for name in gradients
    }
    assert_equal_gradients(gradients, summed, 2e-5)


@pytest.fixture
def counts(monkeypatch):
    """Those of every micro-batch of the test, as it comes."""
    kept = []
    add = MetricWindow.add

    def note(self, counts, sums, is_on_policy):
        kept.append(dict(counts))
        add(self, counts, sums, is_on_policy)

    monkeypatch.setattr(MetricWindow, "add", note)
    return kept


def test_a_run_is_the_runs_of_its_teachers_together(pictures, tmp_path, counts, capsys):
    """Each teacher looks twice at its own rows, as token_weighting asks it. All runs say so."""
    assert_sum_of_runs(pictures, tmp_path, counts, token_weighting="picture_detail")
    assert capsys.readouterr().out.count("tokens have the weights of picture_detail") == 3


def test_with_two_tokenizers_a_run_is_the_runs_of_its_teachers_together(across, tmp_path, counts):
    fields = {"use_uld_loss": True, "uld_use_hybrid_loss": True}
    fields["token_weighting"] = "support.weightings:unsure"
    assert_sum_of_runs(across, tmp_path, counts, **fields)


def test_caches_and_servers_are_teachers_among_others(texts, tmp_path):
    """A cache each, one head on the device at a time, and the losses of teachers that are here."""
    live = run_of(texts, tmp_path / "live", texts.rows, teacher_models=models_of(texts))
    folder = tmp_path / "caches"
    argv = texts.command(
        "--cache_dtype=float32",  # of cache-teacher alone
        teacher_cache=folder,
        teacher_models=json.dumps(models_of(texts)),
        teacher_model_name_or_path=None,
    )
    assert main(["cache-teacher", *argv]) == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(IDS)
    assert main(["check", *(word for word in argv if not word.startswith("--cache_dtype"))]) == 0
    fields = {"teacher_models": models_of(texts), "teacher_cache": str(folder)}
    cached = run_of(texts, tmp_path / "cached", texts.rows, **fields)
    assert losses_of(cached[0]) == pytest.approx(losses_of(live[0]), rel=1e-5)
    assert_equal_gradients(cached[1], live[1], 1e-4)
    teachers = cached[0].teacher
    teachers.place(torch.device("meta"))
    weights = [teacher.side.head.weight for teacher in teachers.teachers.values()]
    assert teachers.head("code").weight.is_meta and not any(weight.is_meta for weight in weights)
    mixed = [row | {"teacher_id": IDS[0]} for row in texts.rows]
    with pytest.raises(ValueError, match=r"row \d: teacher_cache .*math has no such row"):
        run_of(texts, tmp_path / "cached", mixed, **fields)
    model, processor = tiny("qwen3", "teacher", seed=4)
    with served_teacher(model, processor, texts.folder / "code", tmp_path / "states") as served:
        models = models_of(texts) | {"code": served.stub.url}
        one = run_of(texts, tmp_path / "served", texts.rows, teacher_models=models)
        assert len(served.rows) == 2, "its own rows alone"
    assert losses_of(one[0]) == pytest.approx(losses_of(live[0]), rel=1e-5)


def test_what_the_student_writes_and_evaluation_have_their_rows_teacher(texts, tmp_path):
    fields = {"lmbda": 1.0, "max_completion_length": 8, "gradient_accumulation_steps": 2}
    trainer, _ = run_of(
        texts,
        tmp_path,
        Dataset.from_list(texts.rows),
        teacher_models=models_of(texts),
        **fields | {"per_device_train_batch_size": 2},
    )
    assert {"loss/math", "loss/code"} <= set(trainer.state.log_history[0])
    rows = texts.rows[:3]
    metrics = trainer.evaluate(rows)
    parts = [trainer.evaluate([row for row in rows if row["teacher_id"] == key]) for key in IDS]
    for key, own in zip(IDS, parts, strict=True):
        assert metrics[f"eval_loss/{key}"] == pytest.approx(own["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            [{}, {"teacher_id": "maths"}],
            "row 1: teacher_id must be one of teacher_models, math, code, got 'maths'; did you",
        ),
        (
            [{}, {"teacher_id": None}],
            "row 1: teacher_id must be one .*, got None; mend the row, or",
        ),
    ],
)
@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_a_row_of_no_teacher_is_refused_before_weights_are_read(
    rows, text, kind, texts, tmp_path, monkeypatch
):
    monkeypatch.setattr(loading, "load_model", lambda *_args, **_options: pytest.fail("read"))
    rows = [own | more for own, more in zip(texts.rows, rows, strict=False)]
    with pytest.raises(ValueError, match=text):
        run_of(texts, tmp_path, kind(rows), teacher_models=models_of(texts))


def test_a_micro_batch_of_which_no_row_is_left_still_has_a_graph(texts, tmp_path, counts):
    rows = [row | {"teacher_id": "maths"} for row in texts.rows[:1]] + texts.rows[1:2]
    trainer, gradients = run_of(
        texts,
        tmp_path,
        rows,
        teacher_models=models_of(texts),
        on_bad_row="skip",
        **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    )
    assert gradients["model.norm.weight"].norm() > 0
    assert {part["units/math"] for part in counts} == {0}
    assert 0 in {part["units/code"] for part in counts}
    log = trainer.state.log_history[0]
    assert "loss/code" in log and "loss/math" not in log, "a mean over nothing is no 0"


@pytest.mark.parametrize("value", ["1", 1, 1.0])
def test_an_id_may_be_a_whole_number(value):
    assert read_teacher_id({"teacher_id": value}, 0, ("0", "1")) == "1"


@pytest.mark.parametrize("value", [True, 1.5, float("nan"), float("inf"), "", ["1"]])
def test_other_ids_are_refused(value):
    with pytest.raises(
        ValueError, match=r"^row 3: teacher_id must be one of teacher_models, 0, 1, got"
    ):
        read_teacher_id({"teacher_id": value}, 3, ("0", "1"))


def test_the_column_without_several_teachers_is_refused(texts, tmp_path):
    text = r"row 0: teacher_id must stand in a run with teacher_models, got 'math'; set teacher_mo"
    path = str(texts.folder / "math")
    with pytest.raises(ValueError, match=text):
        run_of(texts, tmp_path, texts.rows, teacher_model_name_or_path=path)
    run_of(
        texts,
        tmp_path,
        texts.rows,
        teacher_model_name_or_path=path,
        dataset_ignore_columns=["teacher_id"],
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"teacher_models": {}}, "teacher_models must be a dict of ids without slashes and of mod"),
        ({"teacher_models": {"a/b": "x"}}, "teacher_models must be a dict of ids without slashes"),
        ({"teacher_models": {"a": 3}}, "of models by name, got {'a': 3}; write"),
        ({"teacher_models": "no JSON"}, "teacher_models must be a dict of models by id, got 'no J"),
        ({"seq_kd": True}, "seq_kd must be left out with teacher_models, got True; train with one"),
        ({"teacher_sharding": "fsdp"}, "teacher_sharding must be left out with teacher_models"),
        ({"teacher_batch_size": 2}, "teacher_batch_size must be left out with teacher_models"),
        ({"teacher_model_name_or_path": "x"}, "teacher_model_name_or_path must be left out with"),
        (
            {"teacher_cache": "c", "teacher_cache_form": "head_means", "beta": 0.0},
            "teacher_cache_form must be 'hidden' or 'top_k' with teacher_models, got 'head_means'",
        ),
    ],
)
def test_fields_of_one_teacher_are_refused(fields, text, tmp_path):
    given = FIELDS | {"teacher_models": {"math": "x"}} | fields
    with pytest.raises(ValueError, match=re.escape(text)):
        GOLDConfig(output_dir=str(tmp_path), **given)


def test_teachers_that_see_rows_otherwise_are_refused(across, texts, tmp_path):
    models = models_of(across) | {"code": str(texts.folder / "code")}
    fields = {"use_uld_loss": True, "teacher_models": models}
    text = (
        "all of teacher_models must see rows alike, got teacher 'code' with another chat_template"
    )
    with pytest.raises(ValueError, match=text):
        run_of(across, tmp_path, across.rows, **fields)
    fields = {"use_uld_loss": False, "teacher_models": models}
    with pytest.raises(ValueError, match="must be of one family, got qwen3 and llama"):
        run_of(across, tmp_path, across.rows, **fields)
    given = CACHE_FIELDS | {"teacher_models": models_of(texts)}
    args = GOLDConfig(output_dir=str(tmp_path), **given)
    with pytest.raises(
        ValueError, match="teacher_model must be None with teacher_models, got Qwen3"
    ):
        GOLDTrainer(model=tiny("qwen3")[0], teacher_model=tiny("qwen3")[0], args=args)


def test_a_plan_is_refused(texts, capsys):
    argv = texts.command(
        teacher_models=json.dumps(models_of(texts)), teacher_model_name_or_path=None
    )
    assert main(["plan", *argv]) == 2
    assert "one teacher is expected, got teacher_models with math, code" in capsys.readouterr().err


def test_weights_that_cannot_be_are_found_whoever_the_rows_teacher_is(texts, tmp_path):
    weights = {"token_weighting": "support.weightings:found_later"}
    message = (
        "token_weighting must return .*, got others in step 1, dataset rows 0, 1; the step was"
    )
    for row in (0, 1):
        fields = {"teacher_models": models_of(texts), "token_weighting_kwargs": {"row": row}}
        with pytest.raises(ValueError, match=message):
            run_of(texts, tmp_path, texts.rows[:2], **fields, **weights)

"""The table of losses: what is held out is never trained on, each kind of row runs, and the table
and its plot come from the CSV alone.
"""

import csv
import math
import operator
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_quality as bench
from quality import models, pictures, rows, runs, scales, schooling, table, tasks, workers

from gold_trainer.rendering.collator import build_inputs
from support.inline_pool import Inline

CPU = torch.device("cpu")
KEYS = rows.KEYS


@pytest.fixture
def inline(monkeypatch) -> list[Inline]:
    """Every pool that a worker had."""
    pools: list[Inline] = []
    monkeypatch.setattr(bench.Workers, "_new", lambda self: pools.append(Inline()) or pools[-1])
    monkeypatch.setitem(rows.SCALES, "small", scales.TINY)
    return pools


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures and weights of the tiny scale."""
    folder = tmp_path_factory.mktemp("quality")
    rows.draw(folder, scales.TINY, 1)
    tasks.school_teacher(folder, scales.TINY)
    for family in rows.STUDENT_FAMILY.values():
        tasks.school_student(folder, scales.TINY, family)
    return folder


def test_no_content_is_both_trained_on_and_held_out_whatever_the_seed():
    parts = [
        {asked.content for seed in "ab" for asked in pictures.ask_many(300, seed=seed, held_out=h)}
        for h in (False, True)
    ]
    for kind in pictures.KINDS:
        assert all(any(content[0] == kind for content in part) for part in parts)
    assert not parts[0] & parts[1]
    handwritten = [{i for c in part if c[0] == "number" for i in c[1:]} for part in parts]
    assert not handwritten[0] & handwritten[1]  # each of the two digits, not only the pair


def test_pictures_are_the_same_for_one_seed_and_others_for_another():
    first, again, other = (pictures.ask_many(8, seed=seed, held_out=False) for seed in "aab")
    assert all((a.picture == b.picture).all() for a, b in zip(first, again, strict=True))
    assert not any((a.picture == b.picture).all() for a, b in zip(first, other, strict=True))


def test_answers_are_what_the_pictures_hold():
    _, labels = pictures.handwriting()
    for asked in pictures.ask_many(200, seed="a", held_out=True):
        _, *seen = asked.content
        if asked.kind == "word":
            assert asked.answer == seen[0]
        elif asked.kind == "number":
            assert asked.answer == "".join(str(labels[i]) for i in seen)
        elif asked.kind == "count":
            colour, shape, *things = seen
            number = sum(thing == (colour, shape) for _, thing in things)
            assert asked.answer == pictures.NUMBERS[number - 1]
            assert f"{colour} {shape}" in asked.question
        elif asked.question.startswith("Which"):
            assert asked.answer == f"{'ABCD'[int(np.argmax(seen))]} with {max(seen)}"
        else:
            assert asked.answer == str(seen["ABCD".index(asked.question[-2])])


@pytest.mark.parametrize("pair", rows.PAIRS)
def test_what_schooling_shows_a_model_is_what_the_trainer_would(pair, folder, tmp_path):
    own = runs.Bench(folder, scales.TINY, CPU)
    family = rows.STUDENT_FAMILY[pair]
    student = own.student(family)
    case = rows.Case(pair, "all_labels", "off", "yes", 0)
    trainer = own.trainer(case, student, own.teacher, 1, str(tmp_path))
    dataset = trainer.train_dataset
    batch = trainer.data_collator([dataset[i] for i in range(8)])
    inputs = build_inputs(own.processors[family], batch.examples)
    lessons = own.lessons(family, own.prompts).answered(torch.arange(8), student)
    torch.testing.assert_close(
        lessons["pixel_values"], inputs.tensors["pixel_values"], atol=1e-6, rtol=0
    )
    for row in range(8):
        ids, labels = (
            [
                side["input_ids"][row][side["attention_mask"][row] == 1].tolist()
                for side in (lessons, inputs.tensors)
            ],
            [part[row][part[row] != -100].tolist() for part in (lessons["labels"], inputs.labels)],
        )
        assert ids[0] == ids[1] and labels[0] == labels[1]


@pytest.mark.parametrize("pair", rows.PAIRS)
def test_a_remembered_question_is_collated_as_it_would_be(pair, folder, tmp_path):
    own = runs.Bench(folder, scales.TINY, CPU)
    case = rows.Case(pair, "all_labels", "off", "yes", 0)
    trainer = own.trainer(case, own.student(rows.STUDENT_FAMILY[pair]), own.teacher, 1, tmp_path)
    dataset, remembered = trainer.train_dataset, trainer.data_collator
    some = [dataset[i] for i in (0, 2, 2, 7)]
    remembered([replace(row, index=99, images=[Image.new("RGB", (64, 64))]) for row in some])
    batch, expected = remembered(some), remembered.collator(some)
    assert batch.examples == expected.examples
    assert batch.teacher_examples == expected.teacher_examples
    assert (batch.alignment is None) == (expected.alignment is None) == (pair == "same")
    if pair == "cross":
        groups, of_all = batch.alignment.groups, expected.alignment.groups
        for part, whole in zip(groups, of_all, strict=True):
            same = torch.equal if isinstance(part, torch.Tensor) else operator.eq
            assert same(part, whole)


def test_a_run_of_each_kind_leaves_a_row_and_no_row_is_run_twice(
    folder, tmp_path, monkeypatch, inline
):
    path = tmp_path / "quality.csv"
    options = ["--small", "--folder", str(folder), "--output", str(path)]
    assert bench.main(options) == 0
    found = bench.rows_of(path)
    keys = [tuple(row[key] for key in KEYS) for row in found]
    assert sorted(keys) == sorted(case.key for case in rows.small_cases())
    for row in found:
        assert row["status"] == "ok" and 0 <= float(row["accuracy"]) <= 1
        assert float(row["seconds"]) > 0 and int(row["parameters"]) > 0 and row["git_sha"]
        assert row["teacher_accuracy"] == found[0]["accuracy"] and row["learning_rate"]
        assert row["loss"] in rows.GIVEN or int(row["tokens"]) > 0
    lost = found.pop(3)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, bench.fields_of(rows))
        writer.writeheader()
        writer.writerows(found)
    monkeypatch.setattr(tasks, "run", lambda *args: {"status": "ok", "accuracy": 0.5})
    assert bench.main(options) == 0
    again = bench.rows_of(path)
    assert again[:-1] == found
    assert all(again[-1][key] == lost[key] for key in KEYS) and again[-1]["accuracy"] == "0.5"


def test_a_run_that_fails_is_a_row_with_its_reason(folder, monkeypatch, capsys):
    unknown = rows.Loss("new", ("same",), {"loss": "of_next_year"})
    monkeypatch.setattr(rows, "LOSSES", (unknown,))
    row = tasks.run(folder, scales.TINY, rows.Case("same", "new", "off", "no", 0))
    assert row["status"].startswith("ValueError: GOLDConfig: loss must be one of")
    assert "accuracy" not in row


def test_a_worker_that_dies_leaves_a_row_and_another_takes_its_place(
    folder, tmp_path, monkeypatch, inline
):
    def die(folder, scale, case):
        if case.loss == "uld":
            raise BrokenProcessPool("terminated abruptly")
        return {"status": "ok", "is_lost": case.loss == "labels"}

    monkeypatch.setattr(tasks, "run", die)
    path = tmp_path / "quality.csv"
    options = ["--small", "--folder", str(folder), "--output", str(path), "--workers", "2"]
    assert bench.main(options) == 1
    states = {row["loss"]: row["status"] for row in bench.rows_of(path)}
    assert len(states) == len(rows.small_cases())
    assert states.pop("uld") == "BrokenProcessPool: terminated abruptly"
    assert set(states.values()) == {"ok"} and len(inline) == 2 + 2


def test_workers_rehearse_once_each_and_the_teacher_learns_with_two_beside_it(
    tmp_path, monkeypatch, inline, capsys
):
    order = []
    for name in ("school_teacher", "school_student", "rehearse"):
        task = partial(lambda name, *args: order.append((name, *args[2:])) or {}, name)
        monkeypatch.setattr(tasks, name, task)
    options = bench.parse_options(["--small", "--rehearse"])
    bench.school_all(bench.Workers(5, rows.TURNS), tmp_path, scales.TINY, options)
    beside = [("rehearse", "cross"), ("rehearse", "same")]
    assert order[:3] == [("school_teacher",), *beside]
    assert order[3:5] == [("school_student", "idefics3"), ("school_student", "llava")]
    assert order[5:] == [("rehearse", "cross")] * 2  # the teacher's worker does not


def test_every_loss_has_both_policies_with_and_without_crossentropy_all_seeds_in_turn():
    cases = rows.cases_of([0, 1])
    assert len({case.key for case in cases}) == len(cases)
    for loss in rows.LOSSES:
        own = [case for case in cases if case.loss == loss.name]
        assert len(own) == 2 * 4 * len(loss.pairs)
        assert runs.is_known(loss.fields), loss.name
    assert not runs.is_known({"loss": "of_next_year"}) and not runs.is_known({"no_field": 1})
    on = rows.config_fields(rows.Case("cross", "uld", "on", "yes", 0))
    assert on == {"use_uld_loss": True, "uld_crossentropy_weight": 1.0, "lmbda": 0.5}
    small = rows.config_fields(rows.Case("cross", "chunk_likelihood", "off", "yes", 0))
    assert small["uld_crossentropy_weight"] == 0.01
    off = rows.config_fields(rows.Case("same", "labels", "off", "yes", 0))
    assert off == {"distillation_weight": 0.0, "crossentropy_weight": 1.0, "lmbda": 0.0}


def test_all_seeds_of_each_loss_alone_off_policy_come_before_what_is_added():
    cases, names = rows.cases_of([0, 1, 2]), [loss.name for loss in rows.LOSSES]
    assert [case.rank for case in cases] == sorted(case.rank for case in cases)
    distilled = [case for case in cases if case.loss in names]
    kinds = list(dict.fromkeys((case.policy, case.crossentropy) for case in distilled))
    assert kinds == [("off", "no"), ("off", "yes"), ("on", "no"), ("on", "yes")]
    assert [case.loss for case in cases[:3]] == ["teacher", "before", "before"]
    # a worker leaves its pair where that has nothing as important
    same, cross = (rows.Case(pair, "uld", "off", "no", 0) for pair in rows.PAIRS)
    later = replace(same, policy="on")
    assert workers.choose([same, cross, later], "cross") == cross
    assert workers.choose([cross, later], "same") == cross


def test_schooling_ends_at_its_steps_or_its_seconds(folder):
    own = runs.Bench(folder, scales.TINY, CPU)
    lessons = own.lessons("idefics3", own.prompts)
    for most_seconds, number in ((math.inf, 3), (1e-9, 1)):
        how = scales.Schooling(3, 4, 1e-3, most_seconds)
        model = own.student("idefics3", is_fresh=True)
        losses = schooling.school(model, lessons, how, 0)
        assert len(losses) == number and all(map(math.isfinite, losses))


def fake_row(loss: str, seed: int, accuracy: float, **others: str) -> dict[str, str]:
    row = dict.fromkeys(bench.fields_of(rows), "") | {
        "pair": "same",
        "policy": "off",
        "crossentropy": "no",
    }
    row |= {"loss": loss, "seed": str(seed), "status": "ok", "accuracy": str(accuracy)}
    return row | {"rate": "1.0", "seconds": "2.0", "tokens": "10", **others}


def test_the_table_has_mean_and_spread_and_a_failed_run_changes_neither(tmp_path):
    found = [
        fake_row("teacher", 0, 0.9),
        fake_row("jsd_0", 0, 0.5),
        fake_row("jsd_0", 1, 0.6),
        fake_row("jsd_0", 2, 0.0, status="ValueError: no"),
        fake_row("uld", 0, 0.3, pair="cross", policy="on", crossentropy="yes"),
        fake_row("jsd_0", 0, 0.2, rate="0.3"),
    ]
    line = next(line for line in table.lines_of(found) if line.loss == "jsd_0")
    assert line.mean == pytest.approx(55) and line.spread == pytest.approx(10)
    text = table.report(found, tmp_path / "quality.png")
    assert "| jsd_0 | off | no | 55.0 | 10.0 | 2 | 2 | 10 |" in text
    assert "| uld | on | yes | 30.0 |  | 1 | 2 | 10 |" in text
    assert "20.0" not in text  # another rate is of another table
    assert "| `jsd_0` | 55.0 |  |  |  | 10.0 |" in text
    assert "| `uld` |  |  |  | 30.0 |  |" in text
    assert text.index("teacher") < text.index("jsd_0") < text.index("uld")  # best first
    with Image.open(tmp_path / "quality.png") as picture:
        assert min(picture.size) > 200
    options = SimpleNamespace(**vars(bench.parse_options(["--report"])))
    assert options.output == bench.RESULTS / "quality.csv"


@pytest.mark.parametrize("family", rows.STUDENT_FAMILY.values())
def test_a_kept_picture_is_what_its_processor_makes(family, folder):
    own = runs.Bench(folder, scales.TINY, CPU)
    kept = own.processors[family]
    fresh = models.build_processor(family, runs.texts_for(family, own.prompts))
    for some in (own.images[:3], own.images[1:5]):
        examples = [[image] for image in some]
        text = ["a <image>"] * len(some)
        options = {"text": text, "images": examples, "return_tensors": "pt"}
        mine, expected = kept(**options), fresh(**options)
        assert mine.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(mine[name], expected[name], atol=0, rtol=0)
    assert len(kept.image_processor.kept) == 5


def test_a_run_makes_a_picture_of_its_rows_once(folder, tmp_path):
    own = runs.Bench(folder, scales.TINY, CPU)
    case = rows.Case("cross", "hybrid_0", "off", "no", 0)
    trainer = own.trainer(case, own.student("llava"), own.teacher, 1, tmp_path)
    some = [trainer.train_dataset[i] for i in (0, 3)]
    for _ in range(2):
        batch = trainer.data_collator(some)
        build_inputs(own.processors["llava"], batch.examples)
        build_inputs(own.processors["idefics3"], batch.teacher_examples)
    for processor in own.processors.values():
        pictures_of_rows = [image for image, _ in processor.image_processor.kept.values()]
        assert all(any(image is one for one in pictures_of_rows) for image in own.images[:4:3])
        assert len(pictures_of_rows) <= 4  # and the first one that rendering a prompt took

"""The demo's parts, and one very short run of the whole of it."""

import json

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from gold_trainer.demo import run_demo
from gold_trainer.demo.digits import answer_of, load_pictures, make_rows, parse_answer
from gold_trainer.demo.other_family import build_other_processor
from gold_trainer.demo.report import draw_contact_sheet
from gold_trainer.demo.tiny_vlm import build_processor
from gold_trainer.demo.train import DemoSettings, load_or_train_teacher

SHORT = DemoSettings(
    num_train=24,
    num_held_out=12,
    teacher_steps=2,
    teacher_batch_size=8,
    student_steps=3,
)


def test_an_answer_counts_only_as_one_whole_correct_sentence():
    for digit in range(10):
        assert parse_answer(answer_of(digit)) == digit
    assert parse_answer(" The digit is two, an even number.\n") == 2
    for wrong in ("", "two", "The digit is two, an odd number.", answer_of(2) + " Or three."):
        assert parse_answer(wrong) is None


def test_training_and_held_out_pictures_never_overlap():
    train, held_out = load_pictures()
    assert (len(train), len(held_out)) == (1437, 360)
    held = {picture.tobytes() for picture in held_out.pictures}
    assert not held & {picture.tobytes() for picture in train.pictures}
    assert set(held_out.labels) == set(range(10))


def test_unlabelled_rows_hold_no_trace_of_the_answer():
    train, _ = load_pictures(num_train=20)
    for row in make_rows(train, is_labelled=False):
        assert set(row) == {"prompt", "images"}
    assert all("completion" in row for row in make_rows(train, is_labelled=True))


def test_tokenizers_round_trip_every_answer_and_differ():
    tokenizers = [build().tokenizer for build in (build_processor, build_other_processor)]
    for digit in range(10):
        ids = [t(answer_of(digit), add_special_tokens=False)["input_ids"] for t in tokenizers]
        for tokenizer, side in zip(tokenizers, ids, strict=True):
            assert tokenizer.decode(side) == answer_of(digit)
        assert len(ids[0]) < len(ids[1])


@pytest.mark.parametrize("pair", ["same", "cross"])
def test_a_short_run_writes_everything_it_promises(pair, tmp_path, capsys):
    result = run_demo(tmp_path, SHORT, pair)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("teacher_accuracy", "student_accuracy_before", "student_accuracy_after"):
        assert 0 <= metrics[name] <= 1
    assert metrics["student_parameters"] < metrics["teacher_parameters"]
    assert 0 < metrics["fused_loss_peak_bytes"] < metrics["eager_loss_peak_bytes"]
    assert result.held_out_pictures == 12
    for picture in ("loss.png", "answers.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.width > 500
    assert "student after" in capsys.readouterr().out
    AutoModelForImageTextToText.from_pretrained(tmp_path / "student")
    AutoProcessor.from_pretrained(tmp_path / "student")


def test_answers_that_no_font_can_show_are_drawn_as_they_are(tmp_path, recwarn):
    _, held_out = load_pictures(4, 4)
    answers = ["a$``$ b", "$\\frac$", "", "\x07 \n\U000858e3"]
    draw_contact_sheet(held_out, answers, tmp_path / "answers.png")
    assert (tmp_path / "answers.png").exists()
    assert not [str(each.message) for each in recwarn if "Glyph" in str(each.message)]


def test_a_cached_teacher_counts_only_for_its_own_settings(tmp_path, caplog):
    train, _ = load_pictures(SHORT.num_train)
    processor = build_processor()
    first, seconds = load_or_train_teacher(tmp_path, processor, train, SHORT)
    again, cached_seconds = load_or_train_teacher(tmp_path, processor, train, SHORT)
    assert cached_seconds == seconds
    assert all(a.equal(b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    other = DemoSettings(**{**vars(SHORT), "seed": 1})
    _, new_seconds = load_or_train_teacher(tmp_path, processor, train, other)
    assert new_seconds != pytest.approx(seconds, abs=0.0)
    assert "has other settings" in caplog.text

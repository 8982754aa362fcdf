"""The columns teacher_images and teacher_messages: what is read, shown and refused of them; where
both views of a row go together.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from gold_trainer import GOLDCollator, sharding
from gold_trainer.__main__ import main
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.row_errors import LongPromptError
from gold_trainer.speed.grouping import by_length
from gold_trainer.window import fetch_window
from support.cache_cases import save_pair
from support.teacher_views import hinted, views
from support.tiny_models import tiny, tiny_picture, tiny_rows
from support.trainer_cases import (
    make_trainer,
)


def test_check_shows_both_views(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    pair = save_pair(tmp_path)
    tiny_picture(7).save(tmp_path / "other.png")
    row = {**json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])}
    row |= {"teacher_messages": hinted(row), "teacher_images": ["other.png"]}
    plain = {"messages": row["messages"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(plain))
    assert main(["check", *pair.command("--num_examples=2")]) == 0
    text = capsys.readouterr().out
    flat = " ".join(text.replace("|", " ").split())
    assert "teacher, prompt" in flat and "student, prompt" in flat
    assert "It is red." in flat and "(40 x 40)" in flat and "(36 x 60)" in flat, flat
    assert "row 1: scored tokens" in flat


CHAT = tiny_rows(1)[0]["messages"]
HINT = hinted({"messages": CHAT})
PICTURE = tiny_picture(0)
TWO = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "user", "content": TWO[1:]}, CHAT[1]], "image": PICTURE}
            | {"teacher_images": [PICTURE] * 2},
            "teacher_images: the prompt has 1 image parts but the row has 2 pictures; make them",
        ),
        (
            {"image": PICTURE, "teacher_messages": [{"role": "user", "content": TWO}]},
            "teacher_messages: the prompt has 2 image parts but the row has 1 pictures; make them",
        ),
        (
            {"teacher_messages": [HINT[0], {"role": "assistant", "content": "Blue."}]},
            "teacher_messages: its answer must be the row's own, .* got content 'Blue.' where the",
        ),
        (
            {
                "teacher_messages": HINT,
                "messages": [CHAT[0], CHAT[1] | {"reasoning_content": "Hm"}],
            },
            "teacher_messages: its answer .*, got reasoning_content None where the row .* 'Hm'; l",
        ),
        (
            {"teacher_messages": HINT, "messages": CHAT[:1]},
            "teacher_messages: its answer .* where the row has none, which is yet to be",
        ),
        (
            {"teacher_messages": HINT[1:]},
            "teacher_messages: a conversation must have a message bef",
        ),
        ({"teacher_messages": [{"content": "x"}]}, "teacher_messages: a message must have a role"),
        (
            {"teacher_messages": 3},
            "teacher_messages: a conversation must be a list of messages, got",
        ),
        ({"teacher_image": PICTURE}, "columns must .*, got teacher_image, which nothing uses"),
        ({"teacher_images": ["nowhere.png"]}, r"teacher_images\[0\]"),
        (
            {"teacher_images": [PICTURE]}
            | {
                "teacher_messages": [
                    {"role": "user", "content": [{"type": "image", "image": PICTURE}]}
                ]
            },
            "teacher_messages: pictures must be in one place, got teacher_images and parts",
        ),
        (
            {"teacher_messages": [{"role": "user", "content": "\ud800"}]},
            "teacher_messages.*Unicode",
        ),
        (
            {"messages": None, "prompt": [CHAT[0], {"role": "assistant", "content": "A "}]}
            | {"completion": "bar.", "teacher_messages": HINT[:1]},
            "teacher_messages: it must not stand beside a completion that goes on where the prompt",
        ),
    ],
)
def test_a_view_that_cannot_be_is_refused_by_row_and_column(row, message):
    options = {"needs_completion": False, "is_text": False}
    with pytest.raises(ValueError, match=message) as caught:
        RowDataset([{"messages": CHAT, **row}], **options)[0]
    assert str(caught.value).startswith(("row 0: ", "RowDataset: "))


@pytest.mark.parametrize("nothing", [None, [], "", "[]", "null"])
def test_columns_that_hold_nothing_do_not_count(nothing):
    row = {"messages": CHAT, "teacher_messages": nothing, "teacher_images": nothing}
    assert RowDataset([row], needs_completion=True, is_text=False)[0].view is None


def test_text_students_and_several_answers_are_refused():
    rows = [{"messages": CHAT, "teacher_images": [PICTURE]}]
    with pytest.raises(ValueError, match="row 0: teacher_images: a text-only student takes no"):
        RowDataset(rows, needs_completion=True, is_text=True)[0]
    rows = [{"messages": CHAT * 2, "teacher_messages": HINT}]
    with pytest.raises(ValueError, match=r"row 0, turn 0: teacher_messages: .* got 2, each an"):
        RowDataset(rows, needs_completion=True, is_text=True, train_on="all")[0]
    rows = [{"prompt": "a", "completion": "b", "teacher_messages": HINT[:1]}]
    with pytest.raises(ValueError, match="teacher_messages must be plain text beside a plain prom"):
        RowDataset(rows, needs_completion=True, is_text=True)[0]
    rows[0]["teacher_messages"] = "hint: a"
    row = RowDataset(rows, needs_completion=True, is_text=True)[0]
    assert (row.prompt, row.seen_by_teacher().prompt) == ("a", "hint: a")


def test_both_views_are_cut_to_the_room_of_the_longer_prompt(tmp_path):
    rows, _ = views("qwen3")
    trainer = make_trainer(tmp_path, rows, "qwen3")
    collator = trainer.data_collator
    plain = collator([trainer.train_dataset[0]])
    length = plain.teacher_examples[0].prompt_length
    assert length > plain.examples[0].prompt_length
    collator.max_length = length + 3
    batch = collator([trainer.train_dataset[0]])
    assert batch.examples[0].written_ids == batch.teacher_examples[0].written_ids
    assert len(batch.examples[0].written_ids) == 3
    sample = batch.examples[0].with_sample([5] * 6, [-1.0] * 6)
    batch = trainer.objective.with_completions(batch, "student", [sample])
    assert batch.examples[0].logprobs == [-1.0] * 3
    assert trainer.objective.num_items([batch]) == [3, 3]
    collator.max_length = length
    with pytest.raises(LongPromptError, match="on the teacher's side, row 0: the prompt has"):
        collator([trainer.train_dataset[0]])


def test_a_window_keeps_each_side_its_pictures_and_its_place(tmp_path):
    rows, _ = views("qwen3_vl")
    trainer = make_trainer(tmp_path, rows, "qwen3_vl")
    items = trainer.train_dataset
    batches = [trainer.data_collator([items[i] for i in part]) for part in ((4, 0), (3, 3), (4, 4))]
    window = fetch_window(iter(batches), 3)
    sides = window[1].examples, window[1].teacher_examples
    assert [[len(example.images) for example in side] for side in sides] == [[1, 1], [2, 2]]
    assert sides[0][0].images is sides[0][1].images and sides[1][0].images is sides[1][1].images
    assert window[2].teacher_examples is window[2].examples
    dealt = by_length(window, ["dataset"] * 3)
    for batch in dealt:
        pairs = list(zip(batch.examples, batch.teacher_examples, strict=True))
        assert all(own.index == other.index for own, other in pairs)
    assert sum(batch.teacher_examples is batch.examples for batch in dealt) == 1


def test_ranks_run_a_teacher_in_parts_on_the_pictures_that_any_teacher_sees(monkeypatch):
    """A row's own pictures may be none where its teacher has some."""
    collator = GOLDCollator(tiny("qwen3_vl")[1], [0], None, [])
    row = RowDataset(
        [{"messages": CHAT, "teacher_images": [PICTURE]}, {"messages": CHAT}],
        needs_completion=True,
        is_text=False,
    )
    here, there = (collator([row[i]]) for i in (1, 0))
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, device="cpu")
    accelerator.reduce = lambda flags, reduction: torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    monkeypatch.setattr(sharding, "is_sharded", lambda model: True)
    sides = {"student": collator, "teacher": collator}
    pictures = sharding.PicturesForAll(accelerator, None, sides)
    (batch,) = pictures.add([here])
    assert (batch.unscored, len(batch.teacher_unscored)) == ([], 1)
    assert batch.teacher_examples is not batch.examples, "the teacher's inputs are its own"
    (batch,) = pictures.add([there])
    assert batch.unscored == batch.teacher_unscored == []

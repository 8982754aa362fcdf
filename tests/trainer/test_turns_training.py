"""A run over every turn is the run over rows that hold one turn each."""

import pytest
import torch

from gold_trainer.window import fetch_window
from support.cross_cases import cross_trainer, make_sides
from support.streams import Stream
from support.tiny_models import tiny_picture
from support.trainer_cases import assert_equal_gradients, losses_of, make_trainer

ANSWERS = ("A red bar.", "It is not small at all.", "A green cross, please.")


def conversations(has_pictures=True):
    """Of 1, 2, 3 and 2 turns; a picture in the first turn, and one in the last."""
    rows = []
    for number, turns in enumerate((1, 2, 3, 2)):
        messages = []
        for turn in range(turns):
            is_place = has_pictures and turn in (0, turns - 1)
            question = "<image>What is this?" if is_place else "And now?"
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": ANSWERS[(number + turn) % 3]})
        pictures = [tiny_picture(number + i) for i in range(1 + (turns > 1))]
        rows.append({"messages": messages} | ({"images": pictures} if has_pictures else {}))
    return rows


def one_turn_each(rows):
    expanded = []
    for row in rows:
        for end in range(2, len(row["messages"]) + 1, 2):
            messages = row["messages"][:end]
            count = sum("<image>" in message["content"] for message in messages)
            pictures = {"images": row["images"][:count]} if "images" in row else {}
            expanded.append({"messages": messages} | pictures)
    return expanded


def weights_of(trainer):
    return trainer.model.state_dict()


def assert_same(actual, expected):
    assert losses_of(actual) == losses_of(expected) and losses_of(actual)
    for name, weight in weights_of(expected).items():
        assert torch.equal(weight, weights_of(actual)[name]), name


RUN = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        # greedy: a sample follows from its row and turn, which are others
        {"lmbda": 0.5, "seed": 4, "top_k": 1},
        {"lmbda": 0.5, "seed": 4, "seq_kd": True, "top_k": 1},
        {"lmbda": 0.5, "num_generations": 2, "train_sampling_strategy": "random", "top_k": 1},
        {"train_sampling_strategy": "random", "dataloader_num_workers": 2},
    ],
)
def test_every_turn_trains_as_a_row_of_its_own(fields, tmp_path):
    rows = conversations()
    fields = RUN | fields
    expected = make_trainer(tmp_path / "rows", one_turn_each(rows), **fields)
    expected.train()
    actual = make_trainer(tmp_path / "turns", rows, train_on="all", **fields)
    assert len(actual.train_dataset) == len(expected.train_dataset) == 8
    actual.train()
    assert_same(actual, expected)


def test_a_stream_is_expanded_as_it_is_read_and_resumes_within_a_row(tmp_path):
    rows = conversations()
    fields = RUN | {"lmbda": 0.5, "seed": 4, "train_on": "all"}
    whole = make_trainer(tmp_path / "map", rows, **fields)
    whole.train()
    options = fields | {"save_strategy": "steps", "save_steps": 1}
    stream = make_trainer(tmp_path / "stream", Stream(rows), **options)
    stream.train()
    assert_same(stream, whole)
    for step in (1, 2):  # rows begin with examples 0, 1, 3 and 6: these end within one
        resumed = make_trainer(tmp_path / "stream", Stream(rows), **fields)
        resumed.train(resume_from_checkpoint=str(tmp_path / "stream" / f"checkpoint-{step}"))
        assert_same(resumed, whole)


def test_every_turn_is_distilled_across_families(tmp_path):
    rows = conversations(has_pictures=False)[:3]
    runs = []
    for data, train_on in ((rows, "all"), (one_turn_each(rows), "last")):
        sides = make_sides("qwen3", "llama")
        options = {"train_on": train_on, "per_device_train_batch_size": 6, "max_steps": 1}
        runs.append(cross_trainer(tmp_path / train_on, data, *sides, **options))
        runs[-1][0].train()
    assert losses_of(runs[0][0]) == losses_of(runs[1][0])
    assert_equal_gradients(runs[0][1].gradients, runs[1][1].gradients)


def test_evaluation_sees_every_turn(tmp_path):
    rows = conversations()
    losses = []
    for data, train_on in ((rows, "all"), (one_turn_each(rows), "last")):
        trainer = make_trainer(tmp_path, data, eval_rows=data, train_on=train_on, **RUN)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_turns_of_a_row_in_one_window_keep_their_own_pictures(tmp_path):
    trainer = make_trainer(tmp_path, conversations(), train_on="all", **RUN)
    batches = fetch_window(iter(trainer.get_train_dataloader()), 4)
    examples = [example for batch in batches for example in batch.examples]
    assert [(e.index, e.turn, len(e.images)) for e in examples] == [
        *((0, 0, 1), (1, 0, 1), (1, 1, 2)),
        *((2, 0, 1), (2, 1, 1), (2, 2, 2), (3, 0, 1), (3, 1, 2)),
    ]

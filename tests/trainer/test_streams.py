"""Streaming datasets train as those with a length do, a resumed run included."""

from itertools import islice

import datasets
import pytest
import torch
from accelerate.data_loader import DataLoaderShard
from PIL import Image

from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.streams import RowStream, passes
from support.resumed_runs import FIELDS, assert_same_run
from support.streams import Stream
from support.tiny_models import tiny_rows
from support.trainer_cases import losses_of, make_trainer

ROWS = tiny_rows(40, images="mixed")
STREAMING = FIELDS | {"train_sampling_strategy": "sequential", "lmbda": 0.5}


def of_datasets(rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


def shuffled(rows):
    return of_datasets(rows).shuffle(seed=3, buffer_size=4)


@pytest.mark.parametrize("make", [Stream, of_datasets])
def test_stream_trains_to_the_weights_of_the_same_rows_in_order(make, tmp_path):
    whole = make_trainer(tmp_path / "map", ROWS, **STREAMING)
    whole.train()
    streamed = make_trainer(tmp_path / "stream", make(ROWS), **STREAMING)
    streamed.train()
    assert_same_run(streamed, whole)


def test_resumed_stream_is_the_uninterrupted_one(tmp_path):
    options = STREAMING | {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, Stream(ROWS), **options)
    whole.train()
    resumed = make_trainer(tmp_path, Stream(ROWS), **STREAMING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("make", [Stream, shuffled])
def test_stream_that_begins_again_keeps_its_steps_whole_and_is_resumed_in_any_pass(make, tmp_path):
    """A micro-batch that was left over went into the next step, whose loss and gradient doubled,
    and a resumed run began its second pass anew."""
    fields = STREAMING | {"lmbda": 0.0}  # rollouts follow from a row's number
    options = fields | {"save_strategy": "steps", "save_steps": 1}
    whole = make_trainer(tmp_path, make(ROWS[:6]), **options)
    whole.train()
    if make is Stream:  # three batches in windows of two
        rows = make_trainer(tmp_path / "map", ROWS[:6] * 5, **fields)
        rows.train()
        assert_same_run(whole, rows)
    resumed = make_trainer(tmp_path, make(ROWS[:6]), **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_run(resumed, whole)


def test_each_pass_has_each_row_once_whatever_files_the_workers_have(tmp_path):
    """A worker with few rows waits for the others, and none reads by the epoch of another."""
    files = datasets.IterableDataset.from_generator(
        lambda numbers: (ROWS[i] for n in numbers for i in range(n, 5, 3)),
        gen_kwargs={"numbers": [0, 1, 2]},
    )
    fields = STREAMING | {"per_device_train_batch_size": 1, "dataloader_num_workers": 3}
    trainer = make_trainer(tmp_path, files, **fields)
    batches = passes(trainer.get_train_dataloader(), 0)
    for _ in range(3):
        seen = [tuple(batch.examples[0].written_ids) for batch in islice(batches, 5)]
        assert len(set(seen)) == 5


def test_stream_that_is_its_own_iterator_may_begin_again(tmp_path):
    class Again(torch.utils.data.IterableDataset):
        def __iter__(self):
            self.rows = iter(ROWS)
            return self

        def __next__(self):
            return next(self.rows)

    whole = make_trainer(tmp_path / "map", ROWS, **STREAMING)
    whole.train()
    streamed = make_trainer(tmp_path / "stream", Again(), **STREAMING)
    streamed.train()
    assert_same_run(streamed, whole)


def test_stream_that_gives_its_rows_once_is_refused(tmp_path):
    class Once(torch.utils.data.IterableDataset):
        def __init__(self):
            self.rows = iter(ROWS)

        def __iter__(self):
            return self.rows

    with pytest.raises(ValueError, match="got Once, whose __iter__ returns one iterator each time"):
        make_trainer(tmp_path, Once(), **STREAMING)
    loader = DataLoaderShard(
        RowStream(Once(), needs_completion=True, is_text=False), batch_size=None
    )
    with pytest.raises(ValueError, match=r"whenever it is read, got none in pass 2; make a new"):
        list(passes(loader, 0))


def test_an_epoch_of_a_stream_is_told_to_be_the_run(tmp_path, caplog):
    fields = STREAMING | {"save_strategy": "epoch"}
    make_trainer(tmp_path, Stream(ROWS), **fields)
    assert "with save_strategy='epoch' all is done at its end; set 'steps'" in caplog.text


def test_stream_is_evaluated(tmp_path):
    options = STREAMING | {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    losses = []
    for rows in (ROWS[:5], {"a": Stream(ROWS[:5])}):
        trainer = make_trainer(tmp_path, Stream(ROWS), eval_rows=rows, **options)
        trainer.train()
        (entry,) = [e for e in trainer.state.log_history if {"eval_loss", "eval_a_loss"} & e.keys()]
        losses.append(entry.get("eval_loss", entry.get("eval_a_loss")))
        assert losses_of(trainer)
    assert losses[0] == losses[1]


def test_rows_of_a_stream_are_those_of_a_dataset_and_errors_name_them():
    options = {"needs_completion": True, "is_text": False}
    assert list(RowStream(Stream(ROWS), **options)) == list(RowDataset(ROWS, **options))
    broken = [*ROWS[:3], {"messages": ROWS[3]["messages"][:1]}]
    with pytest.raises(ValueError, match="row 3: an assistant's answer"):
        list(RowStream(Stream(broken), **options))


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (ROWS, {"max_steps": -1}, "max_steps must be set for a streaming dataset"),
        (ROWS, {"num_generations": 2}, "num_generations must be 1 with a streaming dataset"),
        ([], {}, "must have at least one row"),
        ([{"messages": []}], {}, "row 0"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_at_once(rows, fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, Stream(rows), **(STREAMING | fields))


def test_several_workers_read_a_stream_of_files_once(tmp_path):
    """datasets deals its files to the workers."""
    for part in range(2):
        table = datasets.Dataset.from_list(tiny_rows(10, images=0, seed=part))
        table.to_parquet(tmp_path / f"{part}.parquet")
    stream = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "*.parquet"), split="train", streaming=True
    )
    trainer = make_trainer(
        tmp_path / "run", stream, **(STREAMING | {"dataloader_num_workers": 2, "lmbda": 0.0})
    )
    trainer.train()
    assert trainer.state.global_step == FIELDS["max_steps"]


def test_rows_of_several_workers_keep_their_own_pictures(tmp_path):
    """A window takes rows of one number for one row; each worker counted its rows from 0."""

    def shards(numbers):
        for number in numbers:
            yield ROWS[number] | {"images": [Image.new("RGB", (32 + 4 * number, 32))]}

    rows = datasets.IterableDataset.from_generator(shards, gen_kwargs={"numbers": [3, 5]})
    assert rows.n_shards == 2
    seen = {}
    for num_workers in (0, 2):
        fields = {"per_device_train_batch_size": 1, "max_steps": 1, "lmbda": 0.0}
        fields |= {"gradient_accumulation_steps": 2, "dataloader_num_workers": num_workers}
        trainer = make_trainer(tmp_path / str(num_workers), rows, **(STREAMING | fields))
        trainer.callback_handler.train_dataloader = trainer.get_train_dataloader()
        (batches, _) = trainer.get_batch_samples(iter(()), 2, trainer.args.device)
        examples = [example for batch in batches for example in batch.examples]
        assert [example.index for example in examples] == [0, 1]
        seen[num_workers] = [(e.written_ids, e.images[0].size) for e in examples]
    assert seen[2] == seen[0] and seen[0][0] != seen[0][1]


@pytest.mark.parametrize(("make", "is_named"), [(Stream, True), (of_datasets, False)])
def test_a_stream_that_every_worker_reads_is_named(make, is_named, tmp_path, caplog):
    make_trainer(tmp_path, make(ROWS), **(STREAMING | {"dataloader_num_workers": 2}))
    assert ("Stream has to deal its rows to them" in caplog.text) == is_named


def test_a_stream_of_a_table_hands_out_what_the_table_does(tmp_path):
    """Keys that are filled up with None are left out, and pictures are checked, then decoded."""
    function = {"name": "look", "arguments": {"at": "bar"}}
    calls = [{"function": function}, {"function": {"name": "look", "arguments": {"for": "bar"}}}]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    columns = {
        "messages": [[{"role": "user", "content": "Who?"}, answer]],
        "image": ["https://example.com/a.png"],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    options = {"needs_completion": True, "is_text": False}
    with pytest.raises(ValueError, match=r"^row 0: image must be a file, got the address"):
        next(iter(RowStream(table.to_iterable_dataset(), **options)))
    (row,) = RowStream(table.to_iterable_dataset(), ignore_columns=["image"], **options)
    assert row.answer == answer

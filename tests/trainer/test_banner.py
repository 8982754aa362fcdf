"""The lines before the first step: data and tokens, kinds of rows, precision, memory."""

import logging
import re

import datasets
import pytest
import torch
from transformers import TrainerState

from gold_trainer import GOLDConfig
from gold_trainer.activations import activation_bytes
from gold_trainer.banner import Banner
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.row_sample import sample_rows
from support.tiny_models import tiny, tiny_picture, tiny_rows
from support.trainer_cases import make_trainer

CHAT = tiny_rows(1)[0]
PLAIN = {"prompt": "1 + 1 =", "completion": " 2"}


def banner(folder, rows, capsys, family="llama", **fields):
    make_trainer(folder, rows, family, **fields).train()
    shown = capsys.readouterr().out
    return dict(re.findall(r"^  ([a-z_-]+) +(.*)$", shown[: shown.index("{'loss'")], re.MULTILINE))


def test_tokens_precision_and_memory_are_said(tmp_path, capsys):
    lines = banner(tmp_path, tiny_rows(32), capsys, loss_budget_mib=64)
    tokenizer = tiny("llama")[1]
    (text,) = re.findall(r"about (\d+) tokens of text a row, (\d+) in all", lines["data"])
    texts = [" ".join(m["content"] for m in row["messages"]) for row in tiny_rows(32)]
    lengths = sorted(len(tokenizer(text)["input_ids"]) for text in texts)
    assert lengths[15] <= int(text[0]) <= lengths[16]
    assert int(text[1]) == 32 * int(text[0])
    assert lines["precision"] == "weights in float32; gradient_checkpointing is off"
    assert re.search(r"activations roughly [\d.]+ MiB for 4 x \d+ tokens of text;", lines["memory"])
    assert lines["memory"].endswith("the loss up to 64.0 MiB")


def test_mixed_precision_checkpointing_and_weights_of_tokens_are_said(tmp_path, capsys):
    fields = {"gradient_checkpointing": True, "token_weighting": "support.weightings:graded"}
    lines = banner(tmp_path, tiny_rows(4), capsys, bf16=True, **fields)
    expected = "weights in float32, computed in bf16; gradient_checkpointing is on"
    assert lines["precision"] == expected
    assert lines["loss"] == "jsd, beta 0.5; tokens have the weights of support.weightings:graded"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"beta": 0.0}, "jsd, beta 0"),
        ({"loss": "skew_kl"}, "skew_kl"),
        ({"use_uld_loss": True}, "uld across tokenizers"),
        (
            {"use_uld_loss": True, "uld_use_hybrid_loss": True, "beta": 0.0},
            "hybrid uld across tokenizers, beta 0",
        ),
        (
            {"use_uld_loss": True, "uld_loss_type": "projected_jsd"},
            "projected_jsd across tokenizers, beta 0.5",
        ),
    ],
)
def test_the_loss_is_said_with_its_beta_where_it_has_one(fields, expected, tmp_path):
    config = GOLDConfig(output_dir=str(tmp_path), use_cpu=True, **fields)
    model, tokenizer = tiny("qwen3")
    banner = Banner({"student": model, "teacher": None}, [], tokenizer, None)
    assert dict(banner.lines(config, TrainerState()))["loss"] == expected


@pytest.mark.parametrize("place", [1, 37, 63])
def test_one_row_of_another_kind_is_said_wherever_it_stands(place, tmp_path, capsys, caplog):
    rows = [CHAT] * 64
    rows[place] = PLAIN
    with caplog.at_level(logging.WARNING):
        lines = banner(tmp_path, rows, capsys)
    kinds = "of 64 looked at, 63 are conversations, which get the chat template, and 1 are plain"
    assert kinds in lines["rows"] and kinds in caplog.text


def test_rows_of_one_kind_are_no_mixture(tmp_path, capsys, caplog):
    assert "the chat template is applied" in banner(tmp_path / "a", [CHAT] * 4, capsys)["rows"]
    assert "no chat template is applied" in banner(tmp_path / "b", [PLAIN] * 4, capsys)["rows"]
    assert "two kinds" not in caplog.text


def test_sample_of_a_table_reads_no_picture_and_stands_evenly(monkeypatch):
    rows = [PLAIN | {"image": tiny_picture(n)} for n in range(3)]
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    read = RowDataset(table, needs_completion=True, is_text=False)
    monkeypatch.setattr(type(read.reader.pictures), "read", None)
    sample = sample_rows(read, tiny("qwen3_vl")[1].tokenizer)
    assert (sample.num_plain, sample.num_conversations) == (0, 3), "pictures make messages of text"
    many = RowDataset([CHAT] * 1000, needs_completion=True, is_text=True)
    assert 32 < sample_rows(many, tiny("llama")[1]).num_conversations <= 64


def test_rows_that_cannot_be_read_are_left_to_the_run():
    rows = RowDataset(
        [CHAT, {"messages": 3}, {"messages": None}], needs_completion=True, is_text=True
    )
    assert sample_rows(rows, tiny("llama")[1]).num_conversations == 1


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_estimate_of_activations_is_within_a_factor_of_two(family, is_checkpointed):
    """Of what autograd keeps of the layers, each storage once, weights and inputs left out."""
    model = tiny(family)[0].train()
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive: no place is used twice
        return tensor

    ids = torch.randint(5, 50, (2, 96))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_decoder()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    measured = sum(size for size, _ in kept.values())
    size = activation_bytes(
        model.config, ids.numel(), is_checkpointed=is_checkpointed, is_16_bit=False
    )
    if is_checkpointed:  # the backward pass makes one layer again, which is not seen here
        one = activation_bytes(model.config, ids.numel(), is_checkpointed=False, is_16_bit=False)
        size -= one // model.config.num_hidden_layers
        assert measured / 3 <= size <= measured * 3
    else:
        assert measured / 2 <= size <= measured * 2

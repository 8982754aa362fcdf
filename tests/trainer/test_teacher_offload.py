"""A teacher whose layers stream to the device gives the loss of one that is there, to the bit."""

import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gold_trainer.teachers import offloaded
from gold_trainer.teachers.layer_stream import (
    AHEAD,
    SMALLEST_PIECE,
    Layer,
    LayerStream,
    piece_sizes,
    split_layers,
)
from gold_trainer.teachers.offloaded import write_layers
from support.tiny_models import save_tiny, tiny_rows
from support.trainer_cases import losses_of, make_trainer

CPU = torch.device("cpu")


def train(folder, family="qwen3_vl", images="mixed", **options):
    trainer = make_trainer(folder, tiny_rows(6, images=images), family, max_steps=2, **options)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher's folder."""
    folder = tmp_path_factory.mktemp("teacher")
    return save_tiny(folder, "qwen3_vl", "teacher")


def is_streamed(trainer):
    layers = trainer.teacher_model.model.language_model.layers
    blocks = trainer.teacher_model.model.visual.blocks
    parameters = [*layers.parameters(), *blocks.parameters()]
    return all(parameter.is_meta for parameter in parameters)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Losses of a run with all of the teacher in memory, and of an evaluation behind it."""
    trainer = train(tmp_path_factory.mktemp("here"), seq_kd=True, per_device_train_batch_size=2)
    return losses_of(trainer), trainer.evaluate(tiny_rows(4, images=1))["eval_loss"]


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("is_by_name", [False, True])
def test_losses_are_those_of_a_teacher_in_memory(place, is_by_name, folder, expected, tmp_path):
    """The teacher writes, then it is learnt from; rows with pictures and without."""
    trainer = train(
        tmp_path,
        teacher=str(folder) if is_by_name else None,
        teacher_offload=place,
        seq_kd=True,
        per_device_train_batch_size=2,
    )
    assert is_streamed(trainer)
    losses = losses_of(trainer), trainer.evaluate(tiny_rows(4, images=1))["eval_loss"]
    assert losses == expected


@pytest.mark.parametrize("family", ["llava", "lfm2_vl", "gemma3", "qwen3"])
def test_towers_and_layers_of_other_families_stream(family, tmp_path):
    images = 0 if family == "qwen3" else 1
    expected = train(tmp_path / "here", family, images)
    trainer = train(tmp_path / "away", family, images, teacher_offload="cpu")
    assert losses_of(trainer) == losses_of(expected)


def test_files_of_another_dtype_are_cast_as_they_are_read(folder, tmp_path):
    half = {"teacher": str(folder), "teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    expected = train(tmp_path / "here", **half)
    trainer = train(tmp_path / "away", teacher_offload="disk", **half)
    assert trainer.teacher_model.dtype == torch.bfloat16
    assert losses_of(trainer) == losses_of(expected)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    options = {"teacher_offload": "disk", "save_strategy": "steps", "save_steps": 1}
    expected = losses_of(train(tmp_path / "run", **options))
    trainer = make_trainer(tmp_path / "run", tiny_rows(6, images="mixed"), max_steps=2, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert losses_of(trainer) == expected


def test_layers_of_a_file_by_name_are_read_from_it_and_others_leave_nothing(folder, tmp_path):
    trainer = train(tmp_path / "run", teacher=str(folder), teacher_offload="disk")
    assert not list((tmp_path / "run").glob(".teacher_offload-*/*"))
    trainer = train(tmp_path / "other", teacher_offload="disk")
    (written,) = (tmp_path / "other").glob(".teacher_offload-*")
    assert list(written.glob("*.safetensors"))
    trainer.teacher.folders[0].cleanup()
    assert not written.exists()


def test_what_a_killed_run_left_is_deleted_and_what_is_in_use_stays(tmp_path, caplog):
    left = tmp_path / "run" / ".teacher_offload-abc"
    left.mkdir(parents=True)
    (left / "0.safetensors").write_bytes(b"layers")
    trainer = train(tmp_path / "run", teacher_offload="disk")
    assert not left.exists()
    (own,) = (tmp_path / "run").glob(".teacher_offload-*")
    assert own.name == Path(trainer.teacher.folders[0].name).name and list(own.iterdir())
    (told,) = [r.getMessage() for r in caplog.records if "a run that was killed left" in r.msg]
    assert str(left) in told
    left.mkdir()
    train(tmp_path / "run", "qwen3", 0, save_strategy="no")  # of a run without offloading too
    assert not left.exists()


def test_too_little_memory_or_disk_is_one_sentence(tmp_path, monkeypatch):
    def pack(layer, **_options):
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    monkeypatch.setattr(Layer, "pack", pack)
    with pytest.raises(ValueError, match=r"'cpu' must have 1 MiB of host mem.* out of memory\)"):
        train(tmp_path, teacher_offload="cpu")
    monkeypatch.setattr(offloaded.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=9))
    with pytest.raises(ValueError, match=r"'disk' must have 1 MiB of free disk for the teacher's"):
        train(tmp_path, teacher_offload="disk")


def test_what_layers_are_packed_from_goes_as_they_are_packed(monkeypatch):
    """Never all of the teacher twice in host memory."""
    model, there, pack = Stack(), [], Layer.pack
    first = weakref.ref(model.layers[0].weight)
    monkeypatch.setattr(
        Layer, "pack", lambda layer, **o: (there.append(first() is not None), pack(layer, **o))
    )
    offloaded._pack(split_layers(model, {})[1:], is_pinned=False)  # its helpers are the first
    assert there[0] and not any(there[1:]) and len(there) > 1


class Stack(nn.Module):
    """Layers that are unlike each other, one that runs twice, one that calls another, and a weight
    that is used outside of them.
    """

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 8)
        tied = nn.Linear(8, 5, bias=False)
        tied.weight = self.table.weight
        mixed = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8).double().float().half().float())
        self.helpers = nn.ModuleList([nn.Linear(8, 8)])
        self.layers = nn.ModuleList([nn.Linear(8, 64), nn.Linear(64, 8), mixed, tied])
        self.norm = nn.BatchNorm1d(8)

    def forward(self, ids, fails=False):
        hidden = self.table(ids)
        up, down, mixed, tied = self.layers
        for _ in range(2):
            hidden = down(up(hidden))
        hidden = mixed(self.helpers[0](hidden))
        if fails:
            up(hidden[:, :3])
        return tied(self.norm(hidden))


def test_layers_of_any_size_and_order_run_from_three_buffers():
    model = Stack().eval()
    ids = torch.tensor([0, 3, 4])
    with torch.no_grad():
        expected = model(ids)
        stream = LayerStream(split_layers(model, {}), CPU)
        assert model.table.weight is model.layers[3].weight and not model.table.weight.is_meta
        assert model.layers[0].weight.is_meta
        with stream.running():
            for _ in range(3):
                assert torch.equal(model(ids), expected)
            assert len(stream.slots) == 1 + AHEAD
            with pytest.raises(RuntimeError):
                model(ids, fails=True)
            assert model.layers[0].weight.is_meta
            assert torch.equal(model(ids), expected)
    assert not stream.slots


@pytest.mark.parametrize("num_bytes", [1, 256, 2**20, 2**20 + 1, 3 * 2**20 - 256, 31_474_688])
def test_pieces_of_pinned_memory_hold_a_layer(num_bytes):
    """CUDA's pinned memory comes in powers of two."""
    sizes = piece_sizes(num_bytes)
    assert all(size.bit_count() == 1 for size in sizes)
    assert num_bytes <= sum(sizes) < num_bytes + SMALLEST_PIECE


def test_what_is_copied_ahead_is_what_ran_the_time_before():
    model = Stack().eval()
    layers = split_layers(model, {})
    stream = LayerStream(layers, CPU)
    by_module = {layer.module: layer for layer in layers}
    up, down, mixed = (by_module[module] for module in model.layers[:3])
    helper = by_module[model.helpers[0]]
    ids = torch.tensor([1])
    with torch.no_grad(), stream.running():
        model(ids)
        assert stream.next[down] is helper and stream.next[helper] is mixed
    filled = []
    fill = stream._fill
    stream._fill = lambda slot, layer: (filled.append(layer), fill(slot, layer))
    with torch.no_grad(), stream.running():
        model(ids)
    assert filled[:2] == [up, down]
    assert set(filled) == {up, down, mixed, helper}


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_on_a_gpu_layers_run_from_a_ring_of_buffers(place, tmp_path):
    """Three layers of sixteen on the device, the same numbers, several passes without a wait."""
    device = torch.device("cuda")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=16, vocab_size=512)
    model = LlamaForCausalLM(config).bfloat16().eval().to(device).requires_grad_(False)
    ids = torch.randint(512, (4, 512), device=device)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        layers = split_layers(model, {})
        if place == "disk":
            write_layers(layers, str(tmp_path))
        else:
            for layer in layers:
                layer.pack(is_pinned=True)
            assert all(piece.is_pinned() for layer in layers for piece in layer.pieces)
            held = sum(len(piece) for layer in layers for piece in layer.pieces)
            assert held <= sum(layer.num_bytes + SMALLEST_PIECE for layer in layers)
        stream = LayerStream(layers, device)
        del layers
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with stream.running():
            results = [model(ids, use_cache=False).logits for _ in range(4)]
            extra = torch.cuda.memory_allocated() - before
        torch.cuda.synchronize()
        assert all(torch.equal(result, expected) for result in results)
    results_bytes = sum(result.nbytes for result in results)
    assert extra - results_bytes <= (1 + AHEAD) * stream.num_bytes + 2**21
    assert torch.cuda.memory_allocated() - before - results_bytes < 2**21

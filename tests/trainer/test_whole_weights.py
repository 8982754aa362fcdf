"""Models beside the student are whole on every rank, whatever the student's engine asks of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")

from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
)

from gold_trainer import loading
from gold_trainer.teachers import FrozenTeacher, OffloadedTeacher
from support.tiny_models import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    for part in tiny("qwen3", "teacher"):
        part.save_pretrained(folder)
    return folder


def fields(tmp_path, **given):
    names = ("teacher_model_init_kwargs", "teacher_model_revision", "teacher_offload")
    own = {"teacher_device": "cpu", "device": torch.device("cpu"), "output_dir": str(tmp_path)}
    more = {"max_length": 64, "chat_template_kwargs": None, "cut_to": None}
    return SimpleNamespace(**dict.fromkeys(names) | own | more | given)


@pytest.fixture
def zero_3():
    """The object has to live: transformers holds it weakly."""
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    yield
    assert is_deepspeed_zero3_enabled() and config.is_zero3()


@pytest.fixture
def fsdp(monkeypatch):
    """The second rank of a run that reads the student's weights on the first one alone."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setenv("LOCAL_RANK", "1")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def assert_whole(model, folder):
    stored, own = load_file(folder / "model.safetensors"), model.state_dict()
    assert stored and all(torch.equal(own[name], tensor) for name, tensor in stored.items())


def test_a_teacher_is_read_whole_under_zero_3(folder, zero_3, tmp_path):
    assert_whole(FrozenTeacher.load_model(str(folder), fields(tmp_path)), folder)


@pytest.mark.parametrize("engine", ["zero_3", "fsdp"])
def test_a_teacher_on_disk_is_read_under_any_engine(engine, folder, tmp_path, request):
    """transformers leaves a device_map aside under both."""
    request.getfixturevalue(engine)
    args = fields(tmp_path, teacher_offload="disk")
    teacher = OffloadedTeacher.load(str(folder), tiny("qwen3", "teacher")[1], args)
    stored = load_file(folder / "model.safetensors")
    found = {name: teacher.stored.get(p, p) for name, p in teacher.model.named_parameters()}
    assert any(p.is_meta for p in teacher.model.parameters())
    assert all(torch.equal(tensor, stored[name]) for name, tensor in found.items())


def test_a_model_of_a_config_alone_is_whole_under_zero_3(folder, zero_3):
    model = loading.empty_model(str(folder), None)
    assert all(p.is_meta and p.numel() and not hasattr(p, "ds_id") for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps of a process are Linux's")
def test_a_teacher_by_name_is_mapped_and_not_read(folder, tmp_path):
    """A process that shards it, or streams its layers, touches what it takes."""
    model = FrozenTeacher.load_model(str(folder), fields(tmp_path))
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [
        tuple(int(end, 16) for end in line[0].split("-"))
        for line in maps
        if line[-1].endswith(str(folder / "model.safetensors"))
    ]
    for parameter in model.parameters():
        assert any(start <= parameter.data_ptr() < stop for start, stop in spans)

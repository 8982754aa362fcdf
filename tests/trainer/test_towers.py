"""Frozen towers launch a recording where pictures have the sizes of before."""

import logging

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._pytree import tree_leaves

from gold_trainer.speed import compiling, segments, towers
from gold_trainer.speed.towers import Tower, Towers
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import GradientRecorder, assert_equal_steps, losses_of, make_trainer

ONE, TWO = [[1, 4, 4]], [[1, 4, 4], [1, 2, 4]]


class Fake:
    """A recording that runs what it has recorded, into the tensors that it has shown."""

    def __init__(self, function, pool):
        self.function, self.output, self.num_replays = function, function(), 0

    def replay(self):
        self.num_replays += 1
        for own, new in zip(tree_leaves(self.output), tree_leaves(self.function()), strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(new)


@pytest.fixture(autouse=True)
def recordings(monkeypatch):
    made = []
    monkeypatch.setattr(towers, "Recording", lambda *given: made.append(Fake(*given)) or made[-1])
    monkeypatch.setattr(towers, "_is_here", lambda device: True)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return made


@pytest.fixture
def tower():
    torch.manual_seed(0)
    module = tiny("qwen3_vl")[0].requires_grad_(False).model.visual
    module.config._attn_implementation = segments.OF_SEGMENTS
    return Tower("the tower", module, towers.Pool())


def call(run, sizes):
    torch.manual_seed(1)
    grid = torch.tensor(sizes)
    num_entries = tiny_entries(run)
    return run(torch.randn(int(grid.prod(-1).sum()), num_entries), grid_thw=grid, return_dict=True)


def tiny_entries(run):
    return getattr(run, "__self__", run).module.patch_embed.proj.weight[0].numel()


def plain(tower):
    """A function that the tower's own forward answers."""

    class Plain:
        module = tower.module

        def run(self, *args, **kwargs):
            return type(tower.module).forward(tower.module, *args, **kwargs)

    return Plain().run


def assert_same(one, other):
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    assert len(pairs) == 3 and all(torch.equal(a, b) for a, b in pairs)


def test_sizes_that_come_again_are_launched_from_a_recording(tower, recordings):
    for _ in range(2):
        assert_same(call(tower.run, TWO), call(plain(tower), TWO))
    assert len(recordings) == 1 and recordings[0].num_replays == 1, "it is compared with the tower"
    torch.manual_seed(5)
    patches = torch.randn(24, tiny_entries(tower.run))
    kept = tower.run(patches, grid_thw=torch.tensor(TWO), return_dict=True)
    expected = plain(tower)(patches, grid_thw=torch.tensor(TWO), return_dict=True)
    assert_same(kept, expected)
    assert recordings[0].num_replays == 2
    call(tower.run, TWO)
    assert_same(kept, expected)  # the next pictures come to other tensors


def test_other_sizes_run_as_they_are(tower, recordings):
    for sizes in (ONE, TWO, ONE, TWO):
        assert_same(call(tower.run, sizes), call(plain(tower), sizes))
    assert not recordings
    for sizes in (TWO, ONE, ONE, TWO):
        assert_same(call(tower.run, sizes), call(plain(tower), sizes))
    assert len(recordings) == 1, "one is kept a tower"
    assert recordings[0].num_replays == 2


def test_what_the_recording_would_not_see_is_run(tower, recordings):
    for _ in range(2):
        call(tower.run, ONE)
    weight = tower.weights[0]
    weight.data = weight.data + 1
    assert_same(call(tower.run, ONE), call(plain(tower), ONE))
    with torch.autocast("cpu", torch.bfloat16):
        call(tower.run, ONE)
    tower.module.config._attn_implementation = "sdpa"
    assert_same(call(tower.run, ONE), call(plain(tower), ONE))
    assert recordings[0].num_replays == 1


def test_buffers_that_are_others_are_read(tower, recordings):
    for _ in range(2):
        call(tower.run, ONE)
    rotary = tower.module.rotary_pos_emb
    rotary.inv_freq = rotary.inv_freq * 2
    assert_same(call(tower.run, ONE), call(plain(tower), ONE))
    assert recordings[0].num_replays == 1


def test_a_frozen_adapter_is_switched_off_and_on(recordings):
    """A student without its adapter may be the teacher, with the same pictures."""
    torch.manual_seed(0)
    module = tiny("qwen3_vl")[0].model.visual
    config = LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    inject_adapter_in_model(config, module).requires_grad_(False)
    module.config._attn_implementation = segments.OF_SEGMENTS
    tower = Tower("the tower", module, towers.Pool())
    outputs = []
    for is_on in (True, True, False, True, False):
        for part in module.modules():
            if isinstance(part, BaseTunerLayer):
                part.enable_adapters(is_on)
        module.requires_grad_(False)
        outputs.append(call(tower.run, ONE).pooler_output)
        assert_same(call(tower.run, ONE), call(plain(tower), ONE))
    assert not torch.equal(outputs[0], outputs[2]) and not recordings


@pytest.mark.parametrize("is_trained", [True, False])
def test_a_tower_that_learns_or_is_looked_into_has_its_gradients(is_trained, tower, recordings):
    seen = []
    if is_trained:
        tower.weights[0].requires_grad_(True)
    else:
        tower.module.blocks[0].register_forward_hook(lambda *given: seen.append(given))
    for _ in range(3):
        output = call(tower.run, ONE)
    assert not recordings and output.pooler_output.requires_grad == is_trained
    assert len(seen) == (0 if is_trained else 3)


def test_a_tower_that_cannot_be_recorded_is_named_once(tower, monkeypatch, caplog):
    def refuse(function, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(towers, "Recording", refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            assert_same(call(tower.run, ONE), call(plain(tower), ONE))
    assert [r.message for r in caplog.records] == [
        "GOLDTrainer: the tower runs without a CUDA graph, which costs time: operation not "
        "permitted when stream is capturing"
    ]


def test_a_recording_that_gives_something_else_is_not_used(tower, monkeypatch, caplog):
    monkeypatch.setattr(Fake, "replay", lambda self: self.output.pooler_output.add_(1))
    for _ in range(3):
        assert_same(call(tower.run, ONE), call(plain(tower), ONE))
    assert "its outputs differ from those of the tower" in caplog.text


LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def run(folder, **fields):
    torch.manual_seed(0)
    recorder = GradientRecorder()
    rows = tiny_rows(1, images=1) * 8
    trainer = make_trainer(
        *(folder, rows, "qwen3_vl"), max_steps=4, peft_config=LORA, callbacks=[recorder], **fields
    )
    trainer.train()
    return trainer, recorder


def test_a_step_with_recorded_towers_has_the_same_gradients(tmp_path, monkeypatch, recordings):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    fields = {"per_device_train_batch_size": 2, "gradient_checkpointing": True}
    plain_run, expected = run(tmp_path, compile_models="off", **fields)
    assert not recordings, "compile_models='off' records nothing"
    recorded, actual = run(tmp_path, compile_models="regional", **fields)
    names = [tower.name for tower in recorded.fast.towers.all]
    assert names == ["Qwen3VLVisionModel of the student", "Qwen3VLVisionModel of the teacher"]
    assert [one.num_replays for one in recordings] == [4, 4], "to compare, and in three steps"
    assert losses_of(recorded) == losses_of(plain_run)
    assert_equal_steps(expected, actual)
    assert all("forward" not in vars(tower.module) for tower in recorded.fast.towers.all)


def test_models_without_a_known_tower_have_none():
    assert Towers({"student": tiny("qwen3")[0], "teacher": None}, can_be_recorded=True).all == []
    assert Towers({"student": tiny("idefics3")[0]}, can_be_recorded=True).all == []

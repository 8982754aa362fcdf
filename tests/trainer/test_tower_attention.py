"""A tower's attention within each picture: where it is ours, and where it stays the model's."""

import logging
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import VideoLlama3VisionConfig
from transformers.models.video_llama_3.modeling_video_llama_3 import VideoLlama3VisionModel

from gold_trainer.speed import compiling, segments
from support.tiny_models import tiny

IN_FLOAT32 = SimpleNamespace(bf16=False, fp16=False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    yield
    torch._dynamo.reset()


def test_patches_attend_to_those_of_their_picture():
    query, key, value = torch.randn(3, 1, 2, 10, 8).unbind()
    bounds = torch.tensor([0, 3, 4, 10], dtype=torch.int32)
    actual, _ = segments.attend_segments(
        nn.Module(), query, key, value, None, 0.3, cu_seq_lens_q=bounds, max_length_q=6
    )
    parts = [
        nn.functional.scaled_dot_product_attention(
            *(states[:, :, a:b] for states in (query, key, value)), scale=0.3
        )
        for a, b in ((0, 3), (3, 4), (4, 10))
    ]
    torch.testing.assert_close(actual, torch.cat(parts, dim=2).transpose(1, 2))


def test_a_tower_is_told_and_left_as_it_was():
    model = tiny("qwen3_vl")[0]
    configs = segments.configs_of(list(model.model.visual.blocks))
    assert configs == [model.config.vision_config]
    assert segments.configs_of(list(model.model.language_model.layers)) == []
    with segments.attention_is(segments.OF_SEGMENTS, configs):
        assert model.config.vision_config._attn_implementation == segments.OF_SEGMENTS
        assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert not segments.can_attend(SimpleNamespace(type="xpu"), torch.bfloat16)


def tower(dropout):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "patch_size": 8}
    config = VideoLlama3VisionConfig(**sizes, num_attention_heads=2, attention_dropout=dropout)
    return VideoLlama3VisionModel._from_config(config, attn_implementation="sdpa").train()


def states_of(model):
    torch.manual_seed(1)
    patches, grid = torch.randn(8, 3 * 64), torch.tensor([[1, 2, 2], [1, 2, 2]])
    return model(patches, grid, torch.tensor([1, 1])).last_hidden_state


def kind_of(model):
    layers = list(model.encoder.layers)
    return compiling.LayerKind("a tower", layers, segments.configs_of(layers))


def test_attention_that_drops_out_stays_the_models_own():
    model = tower(dropout=0.5)
    expected, kind = states_of(model), kind_of(model)
    assert not kind.configs and kind_of(tower(dropout=0.0)).configs
    with kind.installed():
        torch.testing.assert_close(states_of(model), expected)


def test_layers_that_our_attention_fails_run_with_the_models_own(monkeypatch, caplog):
    model = tower(dropout=0.0)
    expected, kind = states_of(model), kind_of(model)
    with kind.installed():
        torch.testing.assert_close(states_of(model), expected)
    assert kind.is_compiled
    torch._dynamo.reset()

    def refuse(*args, **kwargs):
        raise ValueError("dtypes of query and key differ")

    monkeypatch.setattr(segments, "scaled_dot_product_attention", refuse)
    with kind.installed():
        assert states_of(model).equal(expected)
    assert not kind.is_compiled and "a tower runs without being compiled" in caplog.text


@pytest.mark.parametrize(("dropout", "has_mask"), [(0.1, False), (0.0, True)])
def test_masks_and_dropout_are_refused_by_name(dropout, has_mask):
    states = torch.randn(1, 2, 4, 8)
    mask = torch.ones(4, 4) if has_mask else None
    with pytest.raises(NotImplementedError, match="neither a mask nor dropout"):
        segments.attend_segments(
            *(nn.Module(), states, states, states, mask, 0.3, dropout),
            cu_seq_lens_q=torch.tensor([0, 4]),
            max_length_q=4,
        )


@pytest.mark.parametrize("touch", ["forward", "compile"])
def test_layers_beside_those_that_are_left_alone_keep_the_models_attention(touch):
    model = tiny("qwen3_vl")[0]
    blocks = model.model.visual.blocks
    config = model.config.vision_config
    blocks.append(deepcopy(blocks[0], {id(config): config}))

    def configs():
        kinds = compiling._kinds_of("student", model, IN_FLOAT32)
        return [kind.configs for kind in kinds if kind.layers[0] in list(blocks)]

    assert configs() == [[config]] and len(blocks) == 3
    if touch == "forward":
        blocks[0].forward = blocks[0].forward
    else:
        blocks[0].compile(backend="eager")
    assert configs() == [[]]

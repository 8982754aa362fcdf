"""Decoder layers as kernels: which are taken, and that they write what the layers do."""

import pytest
import torch
from transformers import LlamaConfig, Ministral3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.ministral3.modeling_ministral3 import Ministral3DecoderLayer

from gold_kernels.triton.launch import is_interpreted
from gold_trainer.writers import compiled_layers, kernel_layers, layer_steps, local
from gold_trainer.writers.fixed_cache import FixedLayer
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer

ROOM = 4
interpreted = pytest.mark.skipif(not is_interpreted(), reason="a GPU has a test of its own")


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(kernel_layers, "takes", lambda weight: True)


def build(tmp_path, family, **fields):
    images = {} if family in ("qwen3", "llama") else {"images": "mixed"}
    rows = [{**r, "messages": r["messages"][:1]} for r in tiny_rows(3, **images)]
    run = make_trainer(tmp_path, rows, family, lmbda=1.0, max_length=None, **fields)
    batch = run.data_collator([run.train_dataset[i] for i in range(3)])
    prompts = [local.Prompt(e.unanswered(), ROOM, 1000 * e.index) for e in batch.examples]
    return run, run.rollouts.writers["student"], prompts


def ids_of(writer, run, prompts):
    written = writer.complete(prompts, run.rollouts.sampling["student"])
    return [completion.token_ids for (completion,) in written]


@interpreted
@pytest.mark.parametrize(
    ("family", "is_taken"), [("qwen3_vl", True), ("llama", True), ("gemma3", False)]
)
def test_layers_of_the_usual_kind_write_the_same_as_kernels(
    family, is_taken, kernels, graphs, tmp_path
):
    run, writer, prompts = build(tmp_path, family)
    expected = ids_of(writer, run, prompts)
    again = local.LocalWriter(writing=writer.writing, collator=writer.collator, args=run.args)
    run.args.rollout_compile = True
    assert ids_of(again, run, prompts) == expected
    assert again.compiled.has_kernels is is_taken
    assert bool(graphs) is not is_taken, "compiled is what has no kernels"


@interpreted
def test_weights_of_32_bits_have_kernels_under_autocast(graphs, tmp_path, monkeypatch):
    """With biases, and what is between the layers in 32 bits; float16, as the interpreter has no
    products of bfloat16.
    """
    monkeypatch.setattr(kernel_layers, "takes", lambda weight: weight.dtype == torch.float16)
    run, writer, prompts = build(tmp_path, "qwen2_5_vl", rollout_compile=True)
    with torch.autocast("cpu", torch.float16):
        ids_of(writer, run, prompts)
    assert writer.compiled.has_kernels and not graphs


@interpreted
@pytest.mark.parametrize("kind", ["another gate", "other arguments"])
def test_layers_that_only_look_usual_are_compiled(kind, kernels, graphs, tmp_path, monkeypatch):
    run, writer, prompts = build(tmp_path, "qwen3")
    prompts = prompts[:1]
    layers = run.model.get_decoder().layers
    if kind == "another gate":
        layers[1].mlp.act_fn = torch.nn.GELU()
    else:
        monkeypatch.setattr(layer_steps, "run_layer", fails)
    expected = ids_of(writer, run, prompts)
    again = local.LocalWriter(writing=writer.writing, collator=writer.collator, args=run.args)
    run.args.rollout_compile = True
    assert ids_of(again, run, prompts) == expected
    assert again.compiled.has_kernels is False and graphs


def fails(*args, **kwargs):
    raise TypeError("other arguments")


@pytest.mark.parametrize("kind", ["quantised", "a gate among queries", "scaled far away"])
def test_layers_that_no_comparison_would_find_are_not_taken(kind, kernels):
    """A quantised weight has no address, queries with a gate are more than the matrix behind
    attention takes, and Ministral 3 differs behind thousands of tokens.
    """
    layer, states = usual_layer()
    assert kernel_layers.fit([layer], states, 1) is not None
    if kind == "quantised":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(layer.mlp, quantization.Int8WeightOnlyConfig())
        assert layer.mlp.up_proj.weight.dtype == states.keys.dtype
    elif kind == "a gate among queries":
        layer.self_attn.q_proj = torch.nn.Linear(64, 128, bias=False)
    else:
        layer, states = usual_layer(Ministral3Config, Ministral3DecoderLayer)
        assert layer.self_attn.config.rope_parameters["llama_4_scaling_beta"]
    assert kernel_layers.fit([layer], states, 1) is None


def usual_layer(config_class=LlamaConfig, kind=LlamaDecoderLayer):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    config = config_class(**sizes, num_attention_heads=4, num_key_value_heads=2)
    keys = torch.zeros(1, 2, 64, 16)
    states = FixedLayer(keys, keys.clone(), torch.zeros(1, dtype=torch.int64))
    return kind(config, layer_idx=0).requires_grad_(False), states


def test_layers_that_give_tuples_are_not_taken():
    errors = []
    run = kernel_layers.compared(lambda states: (states,), lambda states: states, errors)
    states = torch.ones(1, 1, 4)
    assert run(states) == (states,) and errors == [True]


@interpreted
def test_more_rows_than_kernels_take_are_compiled_and_compared_first(
    kernels, graphs, tmp_path, monkeypatch
):
    for module in (compiled_layers, kernel_layers):
        monkeypatch.setattr(module, "MOST_ROWS", 2)
    run, writer, prompts = build(tmp_path, "qwen3", rollout_compile=True)
    few = ids_of(writer, run, prompts[:1])
    assert writer.compiled.has_kernels and writer.compiled.has_compiled is None and not graphs
    assert ids_of(writer, run, prompts)[:1] == few
    assert writer.compiled.has_kernels and writer.compiled.has_compiled and graphs


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm", "qwen2_5_vl"])
def test_kernels_of_a_gpu_write_what_generate_does(family, kernels, tmp_path):
    """In float32, so that rounding makes no other token the likelier one; recorded and not."""
    run, writer, prompts = build(tmp_path, family, use_cpu=False, bf16=False)
    run.model.cuda()
    for _ in range(2):
        written = ids_of(writer, run, prompts)
        assert writer.compiled.has_kernels and writer.record_seconds > 0
        writer.refusal = "generate() writes"
        assert ids_of(writer, run, prompts) == written
        writer.refusal = None

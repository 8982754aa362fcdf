"""Layers compiled for decoding: one graph for all, the same tokens, and nothing stays behind."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gold_kernels.triton.launch import is_interpreted
from gold_trainer.writers import Prompt, compiled_layers, local, shared_inputs
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer

ROOM = 8


def build(tmp_path, family, **fields):
    images = {} if family in ("qwen3", "llama") else {"images": "mixed"}
    rows = [{**r, "messages": r["messages"][:1]} for r in tiny_rows(3, **images)]
    run = make_trainer(tmp_path, rows, family, lmbda=1.0, max_length=None, **fields)
    batch = run.data_collator([run.train_dataset[i] for i in range(3)])
    prompts = [Prompt(e.unanswered(), ROOM, 1000 * e.index) for e in batch.examples]
    return run, run.rollouts.writers["student"], prompts


def ids_of(writer, run, prompts):
    written = writer.complete(prompts, run.rollouts.sampling["student"])
    return [completion.token_ids for (completion,) in written]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_vl"])
def test_layers_share_a_graph_and_write_what_they_write_without(family, graphs, tmp_path):
    run, writer, prompts = build(tmp_path, family)
    expected = ids_of(writer, run, prompts)
    again = local.LocalWriter(writing=writer.writing, collator=writer.collator, args=run.args)
    run.args.rollout_compile = True
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ids_of(again, run, prompts) == expected
    layers = again.compiled.layers
    assert len(layers) == run.model.config.get_text_config().num_hidden_layers > 1
    found = len(graphs)
    assert 1 <= found <= 2, "one, and one more where a length is no longer that of the first try"
    assert ids_of(again, run, prompts[:2]) == expected[:2]
    assert len(graphs) <= found + 1
    assert all(layer._compiled_call_impl is None for layer in layers)
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(len(layers)))
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention
    run.train()


@torch._dynamo.config.patch(recompile_limit=1)
def test_as_many_graphs_as_models_need_are_kept(graphs, tmp_path):
    """torch counts those of all models together: beyond its limit layers run as they are."""
    for family in ("qwen3", "qwen3_vl"):
        run, writer, prompts = build(tmp_path, family, rollout_compile=True)
        before = len(graphs)
        ids_of(writer, run, prompts)
        assert len(graphs) > before, family
    assert torch._dynamo.config.recompile_limit == 1


def test_hooks_that_come_after_the_first_call_run(graphs, tmp_path):
    run, writer, prompts = build(tmp_path, "qwen3", rollout_compile=True)
    before = ids_of(writer, run, prompts)
    assert writer.compiled is not None
    parts = [layer.mlp.down_proj for layer in writer.compiled.layers]
    hooks = [part.register_forward_hook(lambda module, args, out: -3 * out) for part in parts]
    changed = ids_of(writer, run, prompts)
    run.args.rollout_compile = False
    plain = local.LocalWriter(writing=writer.writing, collator=writer.collator, args=run.args)
    assert changed == ids_of(plain, run, prompts) != before
    for hook in hooks:
        hook.remove()
    assert ids_of(writer, run, prompts) == before


@pytest.mark.skipif(not is_interpreted(), reason="the tests of a GPU write with kernels anyway")
def test_layers_with_kernels_write_the_same(graphs, tmp_path, monkeypatch):
    run, writer, prompts = build(tmp_path, "qwen3_vl")
    expected = ids_of(writer, run, prompts)
    again = local.LocalWriter(writing=writer.writing, collator=writer.collator, args=run.args)
    run.args.rollout_compile = True
    for module in (compiled_layers, shared_inputs):
        monkeypatch.setattr(module, "default_backend", lambda tensor: "triton")
    assert ids_of(again, run, prompts) == expected and again.compiled is not None


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "qwen3_vl"])
def test_weights_of_32_bits_are_written_with_in_16_under_autocast(family, graphs, tmp_path):
    """Norms and rotary positions leave keys in 32 bits: nothing else does, and attention casts."""
    run, writer, prompts = build(tmp_path, family, rollout_compile=True)
    dtypes, check = set(), local.check_step

    def checked(base, part, *within):
        dtypes.update(states.dtype for pair in part.layers for states in pair)
        check(base, part, *within)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(local, "check_step", checked)
        ids_of(writer, run, prompts)
    assert writer.refusal is None and writer.compiled is not None
    assert dtypes == {torch.bfloat16}


def test_layers_that_compute_something_else_are_left_as_they_are_and_named(
    tmp_path, monkeypatch, caplog
):
    run, writer, prompts = build(tmp_path, "qwen3")
    expected = ids_of(writer, run, prompts)
    again = local.LocalWriter(writing=writer.writing, collator=writer.collator, args=run.args)
    run.args.rollout_compile = True
    monkeypatch.setattr(compiled_layers, "with_own", lambda function, own: broken)
    assert ids_of(again, run, prompts) == expected
    assert again.compiled is None
    told = [r.getMessage() for r in caplog.records if "are not compiled" in r.getMessage()]
    assert len(told) == 1 and told[0].startswith("Qwen3ForCausalLM writes with layers that are not")


def broken(hidden, *args, **kwargs):
    return hidden * 0


def test_attention_of_one_token_is_that_of_the_library():
    query, key, value = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    mask[0, ..., :2] = False
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    library = ALL_ATTENTION_FUNCTIONS["sdpa"]
    expected, _ = library(module, query, key, value, mask, scaling=0.3)
    actual = compiled_layers.attend(query, key, value, mask, 0.3)
    torch.testing.assert_close(actual, expected)
    torch.library.opcheck(compiled_layers.attend, (query, key, value, mask, 0.3))


def test_on_a_cpu_layers_are_compiled_where_it_is_asked_for_alone(tmp_path):
    run, writer, prompts = build(tmp_path, "qwen3")
    ids_of(writer, run, prompts)
    assert run.args.rollout_compile is None and writer.compiled is None

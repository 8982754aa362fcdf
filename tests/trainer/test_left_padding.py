"""Padding on the left changes neither loss nor gradients, for models with learned positions too."""

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers

from gold_trainer import GOLDConfig
from gold_trainer.data.rows import Row
from gold_trainer.rendering.collator import GOLDCollator
from gold_trainer.writers import Prompt, Sampling, make_writer
from support.tiny_configs import tiny_models
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import assert_equal_gradients, one_step

ROWS = tiny_rows(4)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "GPT2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 2}),
    "BioGpt": ("BioGptConfig", "BioGptForCausalLM", SIZES | {"intermediate_size": 128}),
    "OPT": ("OPTConfig", "OPTForCausalLM", SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "GPTNeo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    ),
    "Llama": ("LlamaConfig", "LlamaForCausalLM", SIZES | {"intermediate_size": 128}),
}


def build(name: str, seed: int):
    config_name, model_name, sizes = MODELS[name]
    tokenizer = tiny("llama")[1]
    ids = {key: getattr(tokenizer, key) for key in ("eos_token_id", "pad_token_id")}
    config = getattr(transformers, config_name)(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, **ids, **sizes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_name)(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_gives_the_step_of_right_padding(name, tmp_path):
    student, teacher = build(name, 0), build(name, 1)

    def step(side: str):
        tokenizer = copy.deepcopy(tiny("llama")[1])
        tokenizer.padding_side = side
        return one_step(
            tmp_path / side,
            ROWS,
            "llama",
            student=copy.deepcopy(student),
            teacher=copy.deepcopy(teacher),
            processor=tokenizer,
            per_device_train_batch_size=4,
        )

    (left_loss, left), (right_loss, right) = step("left"), step("right")
    assert left_loss == pytest.approx(right_loss, rel=1e-5)
    assert_equal_gradients(left, right)


@pytest.mark.parametrize(
    ("model_type", "architecture", "is_together"),
    [
        ("bart", "BartForCausalLM", False),  # takes no positions
        ("rwkv", "RwkvForCausalLM", False),  # takes no mask
        ("recurrent_gemma", "RecurrentGemmaForCausalLM", False),  # padding enters its states
        ("gpt2", "GPT2LMHeadModel", True),
        ("llama", "LlamaForCausalLM", True),
    ],
)
def test_prompts_that_padding_would_change_are_written_by_length(
    model_type, architecture, is_together
):
    tokenizer = tiny("llama")[1]
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (model,) = next(tiny_models(model_type, architecture, [0], **ids))
    masks, generate = [], model.generate

    def record(**inputs):
        masks.append(inputs["attention_mask"])
        return generate(**inputs)

    model.generate = record
    options = {"use_cpu": True, "report_to": "none", "max_completion_length": 3}
    args = GOLDConfig(output_dir="runs/none", **options)
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], None)
    writer = make_writer(lambda: nullcontext(model), collator, args)
    texts = ["A", "A picture of a cat on a mat, and more text.", "Two words", "A"]
    rows = [Row(i, [{"role": "user", "content": text}], None, []) for i, text in enumerate(texts)]
    prompts = [Prompt(collator.example(row), 3, seed=100 * row.index) for row in rows]
    sampling = Sampling.of(args, collator)
    written = writer.complete(prompts, sampling)
    # together: the first call tries a cache on two prompts
    assert [len(mask) for mask in masks] == ([2, 4] if is_together else [2, 1, 1])
    assert is_together or all(mask.all() for mask in masks)
    assert len(written) == 4 and all(completion.token_ids for (completion,) in written)
    if model_type != "recurrent_gemma":  # whose module keeps the states of its last call
        assert writer.complete(prompts, sampling) == written
        ((alone,),) = writer.complete(prompts[1:2], sampling)
        assert alone.token_ids == written[1][0].token_ids, "alone as in company"

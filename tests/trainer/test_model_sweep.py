"""A few architectures of each outcome of `make sweep`, and docs/models.md as the sweep left it."""

import pytest

from support.csv_rows import csv_rows
from support.model_sweep import architectures, try_architecture
from support.models_page import PAGE, RESULTS, page

EXACT = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",  # learned positions
    "opt": "OPTForCausalLM",  # that start at 2
    "roberta": "RobertaForCausalLM",  # that start behind the padding's id
    "rwkv": "RwkvForCausalLM",  # no mask
    "mamba": "MambaForCausalLM",  # states
    "gemma2": "Gemma2ForCausalLM",  # a softcap
    "inkling_text": "InklingForCausalLM",  # a head with more rows than logits
    "qwen3_moe": "Qwen3MoeForCausalLM",  # routers
    "bart": "BartForCausalLM",  # half of an encoder-decoder
    "lfm2_vl": "Lfm2VlForConditionalGeneration",  # pictures
}
REFUSED = {
    "udop": ("UdopForConditionalGeneration", "must be a decoder with a language-model head"),
    "xlnet": ("XLNetLMHeadModel", "must be causal, got the model type 'xlnet'"),
    "dory": ("DoryForCausalLM", "must be a plain torch.nn.Linear, whose place the loss takes"),
    "blip": ("BlipForConditionalGeneration", "whose place the loss takes, got none"),
    "prophetnet": ("ProphetNetForCausalLM", "must be softcap.* at its head for input_ids of shape"),
    "blip-2": ("Blip2ForConditionalGeneration", "got none of pixel_values; put a picture into"),
}


def kind_of(model_type: str, architecture: str) -> str:
    (kind,) = (kind for *key, kind in architectures() if key == [model_type, architecture])
    return kind


@pytest.mark.parametrize("model_type", EXACT)
def test_step_equals_the_eager_step(model_type):
    case = model_type, EXACT[model_type]
    outcome = try_architecture(*case, kind_of(*case))
    assert (outcome.outcome, outcome.reason) == ("exact", "")
    assert outcome.routers == ("added" if model_type == "qwen3_moe" else "")
    assert outcome.rollouts == (
        "by length" if model_type in ("rwkv", "mamba", "bart") else "together"
    )
    assert outcome.tried == ("pictures" if model_type == "lfm2_vl" else "text")


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(model_type):
    architecture, message = REFUSED[model_type]
    case = model_type, architecture
    outcome = try_architecture(*case, kind_of(*case))
    assert outcome.outcome == "refused"
    with pytest.raises(ValueError, match=f"^GOLDTrainer: .*{message}"):
        raise ValueError(outcome.reason)


def test_the_page_is_that_of_the_sweep_and_nothing_failed_obscurely():
    rows = csv_rows(RESULTS)
    assert PAGE.read_text(encoding="utf-8") == page(rows)
    assert len(rows) > 250
    assert [row["model_type"] for row in rows if row["outcome"] == "failed"] == []
    assert all(row["reason"] for row in rows if row["outcome"] != "exact")

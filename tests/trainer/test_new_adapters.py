"""Adapters that a run makes: what would not be trained is refused, what nothing reads is told."""

import pytest

from gold_trainer.adapters import OPTIONS_OF_OWN_LOOPS, check_adapter
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (None, {"r": 4}, "must be a config of peft, got dict; pass LoraConfig"),
        ("LoraConfig", {"inference_mode": True}, "must have inference_mode=False, got True"),
        ("AdaLoraConfig", {"total_step": 9}, "any loop can train, got AdaLoraConfig, which needs"),
        ("TrainableTokensConfig", {"token_indices": [1]}, "LoraConfig.trainable_token_indices=..."),
    ],
)
def test_an_adapter_that_would_not_be_trained_is_refused(name, fields, message, tmp_path):
    adapter = fields if name is None else getattr(peft, name)(**fields)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_rows(4), "qwen3", peft_config=adapter)


@pytest.mark.parametrize("is_disabled", [True, False])
def test_an_adapters_dropout_that_has_no_effect_is_told(is_disabled, tmp_path, caplog):
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1)
    options = {"peft_config": adapter, "disable_dropout": is_disabled}
    make_trainer(tmp_path, tiny_rows(4), "qwen3", **options)
    told = [r for r in caplog.records if "lora_dropout=0.1 of the adapter has no" in r.getMessage()]
    assert len(told) == is_disabled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_replication": [(0, 2), (0, 2)]}, "without layer_replication, which needs layers"),
        ({"alora_invocation_tokens": [5, 6]}, "without alora_invocation_tokens, which needs the"),
        ({"megatron_config": {"a": 1}}, "without megatron_config, which needs a model of Megatron"),
        ({"init_lora_weights": "eva"}, "a pass over data, got 'eva'; make that adapter yourself"),
        ({"init_lora_weights": "corda"}, "a pass over data, got 'corda'"),
        ({"task_type": "SEQ_CLS"}, "task_type of peft_config must be CAUSAL_LM, got SEQ_CLS"),
        ({"lora_alpha": 0}, "a scale above 0, got lora_alpha=0, with which the adapter changes"),
        ({"alpha_pattern": {"q_proj": 0}}, "a scale above 0, got q_proj=0"),
    ],
)
def test_options_of_an_adapter_that_a_step_does_not_train_are_refused(options, message):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], **options)
    with pytest.raises(ValueError, match=f"^GOLDTrainer: .*{message}"):
        check_adapter(config, None)


def test_options_of_newer_adapters_are_refused_where_peft_has_them():
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    names = [name for name in OPTIONS_OF_OWN_LOOPS if hasattr(config, name)]
    assert "layer_replication" in names
    for name in names:
        setattr(config, name, object())
        with pytest.raises(ValueError, match=f"must be without {name}, which needs"):
            check_adapter(config, None)
        setattr(config, name, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers_to_transform": [9]}, "Target modules .* not found in the base model"),
        ({"trainable_token_indices": [999999]}, "index 999999 is out of bounds"),
        ({"exclude_modules": ["q_proj"]}, "No modules were targeted"),
    ],
)
def test_what_peft_refuses_is_told_in_one_sentence(options, message, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], **options)
    start = r"^GOLDTrainer: peft_config must fit the student, a Qwen3ForCausalLM, got what peft"
    with pytest.raises(ValueError, match=rf"{start} refuses \({message}.*\); change it\.$"):
        make_trainer(tmp_path, tiny_rows(4), "qwen3", peft_config=config)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, None),
        ({"target_modules": ["q_proj", "qkv"]}, "target_modules 'qkv'"),
        ({"target_modules": r".*\.q_proj"}, None),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save 'lm_haed'"),
    ],
)
def test_names_of_an_adapter_that_no_module_has_are_told(options, told, tmp_path, caplog):
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options})
    make_trainer(tmp_path, tiny_rows(4), "qwen3", peft_config=config)
    (line,) = [r.getMessage() for r in caplog.records if "no module" in r.getMessage()] or [""]
    assert line == "" if told is None else f"names in {told}: it has no effect" in line

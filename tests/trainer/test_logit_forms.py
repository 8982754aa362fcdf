"""Models that scale or cap their logits: the step equals the eager float64 step of the whole model,
and a model whose logits are of another form is refused.
"""

from dataclasses import replace

import pytest
import torch
import transformers

from gold_trainer.loss_at_head import LogitForm
from support.eager_step import completion_of, eager_step
from support.tiny_models import tiny, tiny_processor, tiny_rows
from support.trainer_cases import assert_equal_gradients, make_trainer, one_step

ROWS = tiny_rows(3)
SIZES = ("student", "teacher")
FORMS = {  # family -> what differs from Llama, on the student and on the teacher
    "Gemma2": (
        {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 32},
        {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 32},
    ),
    "Cohere": ({"logit_scale": 0.25}, {"logit_scale": 3.0}),
    "Granite": ({"logits_scaling": 0.5}, {"logits_scaling": 4.0}),
    "FalconH1": ({"lm_head_multiplier": 2.0}, {"lm_head_multiplier": 0.5}),
}


def build(name: str, size: str, **fields):
    """A model of Llama's tiny sizes with another family's logits."""
    model, tokenizer = tiny("llama", size)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim")
    sizes += ("num_hidden_layers", "num_key_value_heads", "initializer_range")
    sizes += ("bos_token_id", "eos_token_id", "pad_token_id")
    options = {size: getattr(model.config, size) for size in sizes} | fields
    if name == "FalconH1":
        options |= {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(size))
        config = getattr(transformers, f"{name}Config")(**options)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def pair(name: str):
    return [build(name, size, **fields) for size, fields in zip(SIZES, FORMS[name], strict=True)]


@pytest.mark.parametrize("name", FORMS)
def test_step_equals_the_eager_float64_step(name, tmp_path):
    student, teacher = pair(name)
    processor = tiny_processor("llama")
    completions = [completion_of("llama", processor, row) for row in ROWS]
    expected_loss, expected = eager_step(student, teacher, processor, ROWS, completions, beta=0.5)
    options = {"student": student, "teacher": teacher, "per_device_train_batch_size": 3}
    loss, gradients = one_step(tmp_path, ROWS, "llama", **options)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    present = {key: value for key, value in gradients.items() if key in expected}
    assert not any(value.any() for key, value in gradients.items() if key not in expected)
    assert_equal_gradients(present, {key: value.float() for key, value in expected.items()}, 1e-4)


@pytest.mark.parametrize("name", FORMS)
def test_plain_logits_of_such_a_model_would_be_refused(name, tmp_path):
    """Each side alone, so that neither hides the other."""
    for side in SIZES:
        student, teacher = pair(name)
        run = make_trainer(tmp_path, ROWS, "llama", student=student, teacher=teacher)
        owner, field = {"student": (run, "student"), "teacher": (run.teacher, "side")}[side]
        setattr(owner, field, replace(getattr(owner, field), form=LogitForm(side)))
        message = rf"^GOLDTrainer: the {side}'s logits must be .* scale=1.0 and softcap=None from"
        with pytest.raises(ValueError, match=message):
            run.train()


def test_form_that_the_config_does_not_tell_is_refused(tmp_path):
    """Gemma3ForConditionalGeneration leaves the softcap of its config out; then one that halves."""
    student, processor = tiny("gemma3")
    student.config.text_config.final_logit_softcapping = 5.0
    rows = tiny_rows(2, images=1)
    message = "^GOLDTrainer: the student's logits must be softcap.* with scale=1.0 and softcap=5.0"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows, "gemma3", student=student, processor=processor).train()

    teacher, _ = tiny("llama", "teacher")
    forward = teacher.forward

    def halved(**inputs):
        output = forward(**inputs)
        output.logits = output.logits / 2
        return output

    teacher.forward = halved
    with pytest.raises(ValueError, match=r"^GOLDTrainer: the teacher's logits must be softcap"):
        make_trainer(tmp_path, ROWS, "llama", teacher=teacher).train()


def test_softcap_under_an_adapter_and_in_an_evaluation(tmp_path):
    peft = pytest.importorskip("peft")
    student, teacher = pair("Gemma2")
    processor = tiny_processor("llama")
    completions = [completion_of("llama", processor, row) for row in ROWS]
    expected, _ = eager_step(student, teacher, processor, ROWS, completions, beta=0.5)
    options = {
        "student": student,
        "teacher": teacher,
        "peft_config": peft.LoraConfig(target_modules=["q_proj"]),
        "per_device_train_batch_size": 3,
        "learning_rate": 0.0,
    }
    run = make_trainer(tmp_path, ROWS, "llama", eval_rows=ROWS, **options)
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    run.train()
    assert run.state.log_history[-2]["loss"] == pytest.approx(expected, rel=1e-5)
    assert run.model(input_ids=torch.tensor([[1, 2]])).logits.abs().max() <= 2.0

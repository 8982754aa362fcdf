"""The loss of a mixture's routers: added with the model's own coefficient where its forward returns
it, averaged over micro-batches, logged, and left out where the config leaves it out.
"""

from copy import deepcopy

import pytest
import torch
import transformers

from gold_trainer.router_loss import coefficient_of
from support.eager_step import completion_of, eager_step, prompt_inputs
from support.tiny_configs import tiny_models
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import GradientRecorder, assert_equal_gradients, make_trainer

ROWS = tiny_rows(4)
COEFFICIENT = 0.3
FAMILIES = {
    "Mixtral": {"num_local_experts": 4, "router_aux_loss_coef": COEFFICIENT},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "GraniteMoe": {"num_local_experts": 4, "logits_scaling": 2.0},
    "Olmoe": {"num_experts": 4},
    "JetMoe": {"num_local_experts": 4, "aux_loss_coef": COEFFICIENT, "kv_channels": 16},
}


def build(family: str, seed: int = 0, **fields):
    tokenizer = tiny("llama")[1]
    options = {
        "vocab_size": 448,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": COEFFICIENT,
        "initializer_range": 0.1,
        **{k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")},
        **FAMILIES[family],
        **fields,
    }
    config = getattr(transformers, f"{family}Config")(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    model.set_experts_implementation("eager")  # the others have no float64
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def padded(rows: list[dict]):
    """Stock inputs of some rows, prompts and answers, padded on the right."""
    tokenizer = tiny("llama")[1]
    sequences = [
        prompt_inputs(tokenizer, row)["input_ids"][0].tolist()
        + completion_of("llama", tokenizer, row)
        for row in rows
    ]
    width = max(map(len, sequences))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences])
    return {"input_ids": ids, "attention_mask": mask}


def expected_step(student, teacher, rows, batch_size: int):
    """The eager distillation step plus coefficient * mean over micro-batches of stock aux_loss."""
    tokenizer = tiny("llama")[1]
    completions = [completion_of("llama", tokenizer, row) for row in rows]
    loss, gradients = eager_step(student, teacher, tokenizer, rows, completions)
    model = deepcopy(student).double()
    micro_batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    losses = [model(**padded(batch)).aux_loss for batch in micro_batches]
    auxiliary = sum(losses) / len(losses)
    (COEFFICIENT * auxiliary).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = gradients[name] + parameter.grad
    return loss + COEFFICIENT * auxiliary.item(), auxiliary.item(), gradients


@pytest.mark.parametrize(
    ("family", "accumulation"), [(name, 1) for name in FAMILIES] + [("Mixtral", 2), ("Mixtral", 4)]
)
def test_step_equals_the_eager_step_with_the_routers_loss(family, accumulation, tmp_path):
    student, teacher = build(family), build(family, 1)
    batch_size = len(ROWS) // accumulation
    loss, auxiliary, expected = expected_step(student, teacher, ROWS, batch_size)
    recorder = GradientRecorder()
    trainer = make_trainer(
        tmp_path,
        ROWS,
        "llama",
        student=student,
        teacher=teacher,
        callbacks=[recorder],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, rel=1e-5)
    assert log["aux_loss"] == pytest.approx(auxiliary, rel=1e-5)
    assert_equal_gradients(
        {name: recorder.gradients[name].double() for name in expected}, expected, relative=1e-4
    )
    assert any(("gate" in name or "router" in name) and g.any() for name, g in expected.items())


def test_evaluation_logs_it_and_counts_it(tmp_path):
    student, teacher = build("Mixtral"), build("Mixtral", 1)
    loss, auxiliary, _ = expected_step(student, teacher, ROWS, 4)
    options = {"student": student, "teacher": teacher, "eval_rows": ROWS}
    metrics = make_trainer(tmp_path, ROWS, "llama", **options).evaluate()
    assert metrics["eval_aux_loss"] == pytest.approx(auxiliary, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_it_can_choose_the_best_model(tmp_path):
    options = {"teacher": build("Mixtral", 1), "eval_rows": ROWS, "eval_strategy": "steps"}
    options |= {"eval_steps": 1, "metric_for_best_model": "aux_loss", "save_strategy": "best"}
    trainer = make_trainer(tmp_path, ROWS, "llama", student=build("Mixtral"), **options)
    trainer.train()
    assert trainer.state.best_metric == trainer.state.log_history[-2]["eval_aux_loss"]
    student = build("Mixtral", output_router_logits=False)
    with pytest.raises(ValueError, match=r"metric_for_best_model must be one of .*got 'aux_loss'"):
        make_trainer(tmp_path, ROWS, "llama", student=student, **options)


def test_without_router_logits_there_is_none(tmp_path):
    student, teacher = build("Mixtral", output_router_logits=False), build("Mixtral", 1)
    trainer = make_trainer(tmp_path, ROWS, "llama", student=student, teacher=teacher)
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]


def test_coefficient_of_a_model_with_pictures_is_that_of_its_text_model():
    tokenizer = tiny("llama")[1]
    ids = {k: getattr(tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = next(tiny_models("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", [0], **ids))[0]
    model.config.text_config.router_aux_loss_coef = COEFFICIENT
    assert coefficient_of(model) == COEFFICIENT


def test_unknown_coefficient_is_refused():
    model = build("Mixtral")
    del model.router_aux_loss_coef
    model.config = transformers.LlamaConfig()  # of a model that has none
    message = "^GOLDTrainer: a student whose forward returns aux_loss must say its coefficient.*set"
    with pytest.raises(ValueError, match=message):
        coefficient_of(model)

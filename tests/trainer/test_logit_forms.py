"""Models that scale or cap their logits: the form is measured on the model, the step equals the
eager float64 step of the whole model, and a model whose logits are of another form is refused.
"""

import pytest
import torch

from gold_trainer import loss_at_head
from support.eager_step import completion_of, eager_step
from support.logit_forms import FORMS, SIZES, pair
from support.tiny_models import tiny, tiny_processor, tiny_rows
from support.trainer_cases import assert_equal_gradients, make_trainer, one_step

ROWS = tiny_rows(3)


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


def test_the_config_of_a_form_that_the_model_does_not_apply_is_not_believed(tmp_path):
    """Gemma3ForConditionalGeneration leaves the softcap of its config out."""
    (student, processor), (teacher, _) = tiny("gemma3"), tiny("gemma3", "teacher")
    student.config.text_config.final_logit_softcapping = 5.0
    rows = tiny_rows(2, images=1)
    completions = [completion_of("gemma3", processor, row) for row in rows]
    expected_loss, _ = eager_step(student, teacher, processor, rows, completions)
    options = {"student": student, "teacher": teacher, "processor": processor}
    run = make_trainer(tmp_path, rows, "gemma3", **options)
    run.train()
    assert run.student.form.softcap is None
    assert run.state.log_history[0]["loss"] == pytest.approx(expected_loss, rel=1e-5)


def changed(model, change):
    """The model with another forward."""
    forward = model.forward

    def other(**inputs):
        output = forward(**inputs)
        output.logits = change(output.logits)
        return output

    model.forward = other
    return model


@pytest.mark.parametrize(
    ("change", "scale", "softcap"),
    [
        (lambda x: x / 2, 0.5, None),
        (lambda x: -3 * x, -3.0, None),
        (lambda x: x.float() / 7.0, 1 / 7, None),
        (lambda x: 0.1 * (4.0 * torch.tanh(x / 4.0)), 0.1, 0.4),
        (lambda x: 50.0 * torch.tanh(x * 0.02), 1.0, 50.0),
        (lambda x: x.bfloat16(), 1.0, None),
    ],
)
def test_any_scale_and_softcap_are_found(change, scale, softcap, tmp_path):
    teacher = changed(tiny("llama", "teacher")[0], change)
    run = make_trainer(tmp_path, ROWS, "llama", teacher=teacher)
    run.train()
    form = run.teacher.side.form
    assert form.scale == pytest.approx(scale, rel=1e-6)
    assert form.softcap is None if softcap is None else form.softcap == pytest.approx(softcap)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 1,
        lambda x: x.clamp(-3, 3),
        lambda x: torch.log_softmax(x, -1),
        lambda x: x * torch.linspace(1, 2, x.shape[-1]),
        lambda x: x.index_fill(-1, torch.tensor([7]), -1e9),
        lambda x: 0 * x,
        lambda x: x.sigmoid(),
        lambda x: x[..., ::2].repeat_interleave(2, -1),
        lambda x: x[:, -1:],
    ],
)
@pytest.mark.parametrize("side", SIZES)
def test_logits_of_another_form_are_refused(side, change, tmp_path):
    model = changed(tiny("llama", side)[0], change)
    with pytest.raises(ValueError, match=rf"^GOLDTrainer: the {side}'s logits must be softcap\("):
        make_trainer(tmp_path, ROWS, "llama", **{side: model}).train()


def test_logits_of_fewer_entries_than_the_head_has_leave_the_others_out(tmp_path):
    """Inkling's head is padded, its logits are not."""
    student, teacher = (changed(tiny("llama", size)[0], lambda x: x[..., :400]) for size in SIZES)
    stock = [tiny("llama", size)[0] for size in SIZES]
    processor = tiny_processor("llama")
    completions = [completion_of("llama", processor, row) for row in ROWS]
    expected_loss, expected = eager_step(*stock, processor, ROWS, completions, vocab_size=400)
    options = {"student": student, "teacher": teacher, "per_device_train_batch_size": 3}
    loss, gradients = one_step(tmp_path, ROWS, "llama", **options)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_equal_gradients(gradients, {key: value.float() for key, value in expected.items()}, 1e-4)


def test_form_is_measured_once_and_changes_nothing(tmp_path):
    """Dropout stays on, and draws what it would have drawn."""
    peft = pytest.importorskip("peft")
    student, _ = tiny("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    calls = []

    def record(module, _args):
        calls.append(module.training)

    student.register_forward_pre_hook(record)
    options = {"student": student, "peft_config": config, "disable_dropout": False}
    run = make_trainer(tmp_path, ROWS, "llama", max_steps=2, **options)
    state = {}
    measured = loss_at_head.measure

    def measure(*args):
        state["before"] = torch.get_rng_state()
        measured(*args)
        state["after"] = torch.get_rng_state()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_at_head, "measure", measure)
        run.train()
    assert calls == [False, True, True]
    assert torch.equal(state["before"], state["after"])


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

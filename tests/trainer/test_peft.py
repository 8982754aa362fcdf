"""Students with adapters: their own weights as the teacher, and heads in modules_to_save."""

from copy import deepcopy

import pytest
import torch

from gold_trainer import GOLDConfig, GOLDTrainer
from support.eager_step import completion_of, eager_step
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import (
    FIELDS,
    GradientRecorder,
    assert_equal_gradients,
    losses_of,
    make_trainer,
    one_step,
)

peft = pytest.importorskip("peft")

ROWS = tiny_rows(4, images="mixed")
TARGETS = ["q_proj", "k_proj", "v_proj"]
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def adapter(**options):
    """An adapter that changes its model from the start."""
    return peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **options)


def trainer_with(output_dir, teacher, config, rows=ROWS, family="qwen3_vl", student=None, **fields):
    """teacher None: the student's own weights."""
    torch.manual_seed(0)
    recorder = GradientRecorder()
    model, processor = tiny(family)
    options = {"processing_class": processor, "callbacks": [recorder], "eval_dataset": rows}
    if fields.get("use_uld_loss") and teacher is not None:
        options["teacher_processing_class"] = processor
    defaults = {"max_steps": 3, "output_dir": str(output_dir), "learning_rate": 0.5}
    trainer = GOLDTrainer(
        model=model if student is None else student,
        teacher_model=teacher,
        args=GOLDConfig(**(FIELDS | defaults | fields)),
        train_dataset=rows,
        peft_config=config,
        **options,
    )
    return trainer, recorder


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lmbda": 0.5, "seq_kd": True, "max_steps": 6},
        {"use_uld_loss": True},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"modules_to_save": ["lm_head"]},
        {"lora_dropout": 0.5, "disable_dropout": False},
    ],
    ids=lambda fields: "-".join(fields) or "jsd",
)
def test_own_weights_teach_like_a_second_copy_of_them(fields, tmp_path):
    fields = dict(fields)
    lora = {
        name: fields.pop(name) for name in ("modules_to_save", "lora_dropout") if name in fields
    }
    runs = []
    for teacher in (None, deepcopy(tiny("qwen3_vl")[0])):
        trainer, recorder = trainer_with(tmp_path, teacher, adapter(**lora), **fields)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.model.training
        runs.append((before, losses_of(trainer), recorder.gradients))
    (own_eval, own_losses, own_gradients), (eval_loss, losses, gradients) = runs
    assert losses[0] > 1e-3 and losses[-1] != losses[0]
    assert own_eval == eval_loss and own_losses == losses
    assert_equal_gradients(own_gradients, gradients, relative=1e-6)
    if lora.get("modules_to_save"):
        assert any("lm_head" in name and g.any() for name, g in own_gradients.items())


@pytest.mark.parametrize("use_uld_loss", [False, True])
def test_a_fresh_adapter_has_nothing_to_learn_from_its_own_weights(use_uld_loss, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=TARGETS)
    trainer, recorder = trainer_with(tmp_path, None, config, use_uld_loss=use_uld_loss, max_steps=1)
    trainer.train()
    assert abs(losses_of(trainer)[0]) <= 1e-6
    assert max(g.abs().max() for g in recorder.gradients.values()) <= 1e-6


def test_a_student_that_came_with_an_adapter_is_its_own_teacher(tmp_path):
    model = tiny("qwen3_vl")[0]
    students = [peft.get_peft_model(deepcopy(model), adapter())]
    students.append(deepcopy(students[0]))
    losses = []
    for student, teacher in zip(students, (None, model), strict=True):
        trainer, _ = trainer_with(tmp_path, teacher, None, student=student)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == losses[1] and losses[0][0] > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()) or "lora",
)
def test_own_weights_teach_as_in_an_eager_step_from_full_logits(options, tmp_path):
    """The embeddings of qwen3_vl are its head; a copy of one is not a copy of the other."""
    torch.manual_seed(0)
    base, processor = tiny("qwen3_vl")
    assert base.config.tie_word_embeddings
    student = peft.get_peft_model(deepcopy(base), adapter(**options))
    copies = [p for name, p in student.named_parameters() if ".modules_to_save." in name]
    assert len(copies) == (1 if options.get("modules_to_save") else 0)  # a tied one counts once
    with torch.no_grad():
        for parameter in copies:
            parameter.add_(0.1 * torch.randn_like(parameter))
    completions = [completion_of("qwen3_vl", processor, row) for row in ROWS]
    expected_loss, expected = eager_step(student, base, processor, ROWS, completions, beta=0.5)
    trainer, recorder = trainer_with(tmp_path, None, None, student=student)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected_loss, rel=1e-5)
    assert_equal_gradients(recorder.gradients, expected)
    if copies:
        assert any(".modules_to_save." in name and g.any() for name, g in expected.items())


def test_what_was_frozen_of_an_adapter_stays_frozen(tmp_path):
    student = peft.get_peft_model(deepcopy(tiny("qwen3_vl")[0]), adapter())
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".q_proj." in name)
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    trainer, recorder = trainer_with(tmp_path, None, None, student=student)
    trainer.train()
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trainable
    assert recorder.gradients.keys() == trainable


def test_an_error_of_the_teacher_leaves_the_student_as_it_was(tmp_path, monkeypatch):
    trainer, _ = trainer_with(tmp_path, None, adapter())
    student = trainer.model
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}

    def fail(*args, **kwargs):
        assert not student.training and student.get_model_status().enabled is False
        raise RuntimeError("no memory")

    monkeypatch.setattr(trainer.student.head, "forward", fail)
    monkeypatch.setattr("gold_trainer.sides.gather_rows", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.train()
    assert student.training and student.get_model_status().enabled is True
    assert {name for name, p in student.named_parameters() if p.requires_grad} == trainable


def test_a_head_in_modules_to_save_gets_the_gradient_of_the_whole_student(tmp_path):
    rows, student = tiny_rows(4), tiny("llama")[0]
    student.config.tie_word_embeddings = False
    student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().clone())
    config = peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"])
    options = {"student": deepcopy(student), "peft_config": config}
    loss, gradients = one_step(tmp_path, rows, "llama", **options)
    expected_loss, expected = one_step(tmp_path, rows, "llama", student=student)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    (name,) = [name for name in gradients if "lm_head" in name]
    head = {"lm_head.weight": gradients[name]}
    assert_equal_gradients(head, {"lm_head.weight": expected["lm_head.weight"]}, relative=1e-6)


def test_a_trained_head_is_saved_with_the_adapter(tmp_path):
    """Tied embeddings stay as they were: the head is a copy."""
    student = tiny("qwen3_vl")[0]
    base = deepcopy(student)
    trainer = make_trainer(
        tmp_path, ROWS, student=student, peft_config=adapter(modules_to_save=["lm_head"])
    )
    trainer.train()
    trainer.save_model()
    loaded = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path)
    head = loaded.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(head, trainer.student.head.weight)
    assert not torch.equal(head, base.lm_head.weight)
    embeddings = trainer.model.get_base_model().get_input_embeddings().weight
    assert torch.equal(embeddings, base.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"bias": "all"}, r"train its adapter only, got .*\.bias among .*bias='none'"),
        ({"bias": "lora_only"}, r"train its adapter only, got .*\.bias among .*bias='none'"),
        ({"init_lora_weights": "pissa"}, "got init_lora_weights='pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "got init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "got init_lora_weights='olora'"),
    ],
)
def test_an_adapter_that_changes_the_weights_below_needs_a_teacher(options, got, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=TARGETS, **options)
    message = f"^GOLDTrainer: a student that is its own teacher must .*{got}.* teacher_model="
    with pytest.raises(ValueError, match=message):
        trainer_with(tmp_path, None, config, family="qwen2_5_vl")
    trainer_with(tmp_path, tiny("qwen2_5_vl", "teacher")[0], config, family="qwen2_5_vl")


def test_a_trained_weight_below_the_adapter_needs_a_teacher(tmp_path):
    student = peft.get_peft_model(deepcopy(tiny("qwen3_vl")[0]), adapter())
    student.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    message = "^GOLDTrainer: a student that is .* got .*embed_tokens.weight among 1 parameters"
    with pytest.raises(ValueError, match=message):
        trainer_with(tmp_path, None, None, student=student)


@pytest.mark.parametrize("is_own_teacher", [True, False])
def test_an_adapter_loaded_for_inference_is_refused(is_own_teacher, tmp_path):
    base = tiny("qwen3_vl")[0]
    peft.get_peft_model(deepcopy(base), adapter()).save_pretrained(tmp_path)
    student = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path)
    message = "^GOLDTrainer: the student must have parameters that require .* is_trainable=True"
    with pytest.raises(ValueError, match=message):
        trainer_with(tmp_path, None if is_own_teacher else base, None, student=student)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_model_with_virtual_tokens_is_refused(side, kind, tmp_path):
    config = getattr(peft, kind)(num_virtual_tokens=2, task_type="CAUSAL_LM")
    prompted = peft.get_peft_model(deepcopy(tiny("llama")[0]), config)
    message = f"^GOLDTrainer: the {side}'s adapter must change weights, got the prompt .* {kind}"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tiny_rows(4), "llama", **{side: prompted})


@pytest.mark.parametrize("has_teacher", [False, True])
def test_trained_token_rows_of_a_tied_head_learn_as_in_an_eager_step(has_teacher, tmp_path):
    """peft gives the head the same rows as the embeddings."""
    torch.manual_seed(0)
    base, processor = tiny("qwen3_vl")
    assert base.config.tie_word_embeddings
    student = peft.get_peft_model(deepcopy(base), adapter(trainable_token_indices=[5, 70, 300]))
    wrappers = [m for m in student.modules() if type(m).__name__ == "TrainableTokensWrapper"]
    assert len(wrappers) == 2, "embeddings and head"
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    teacher = tiny("qwen3_vl", "teacher")[0] if has_teacher else None
    completions = [completion_of("qwen3_vl", processor, row) for row in ROWS]
    truth = teacher if has_teacher else base
    expected_loss, expected = eager_step(student, truth, processor, ROWS, completions)
    trainer, recorder = trainer_with(tmp_path, teacher, None, student=student)
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected_loss, rel=1e-5)
    assert_equal_gradients(recorder.gradients, expected)
    assert any("trainable_tokens" in name and g.any() for name, g in expected.items())


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_float32_head_over_bfloat16_weights_trains(lmbda, tmp_path):
    """As peft keeps the copies of modules_to_save; the stock model alone refuses to run."""
    config = adapter(modules_to_save=["lm_head"])
    student = peft.get_peft_model(tiny("qwen3_vl")[0].bfloat16(), config)
    for name, parameter in student.named_parameters():
        if "lm_head.modules_to_save" in name:
            parameter.data = parameter.data.float()
    with pytest.raises(RuntimeError, match="dtype"):
        student(input_ids=torch.tensor([[1, 2]]))
    teacher = tiny("qwen3_vl", "teacher")[0].bfloat16()
    trainer, recorder = trainer_with(tmp_path, teacher, None, student=student, lmbda=lmbda)
    trainer.train()
    (head,) = (g for name, g in recorder.gradients.items() if "lm_head" in name)
    assert head.dtype == torch.float32 and head.any()

"""A prompt that is computed once for all of its completions teaches what each row alone teaches."""

import pytest
import torch
from peft import LoraConfig

from gold_trainer import GOLDConfig, GOLDTrainer, models
from support.cross_cases import cross_trainer, make_sides
from support.tiny_models import save_tiny, tiny, tiny_rows, with_lengths
from support.trainer_cases import FIELDS, GradientRecorder, assert_equal_steps, losses_of

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
# a micro-batch of two prompts, and of one
THREE_OF_TWO = {
    "per_device_train_batch_size": 6,
    "num_generations": 3,
    "max_steps": 2,
    "lmbda": 1.0,
}


def watch(model):
    """Tokens that the model's first layer sees, and patches or pictures that its tower gets: of a
    student those from which it learns.
    """
    tokens, pictures = [], []
    base = models.base_model(model)
    is_student = any(weight.requires_grad for weight in model.parameters())

    def add(found, size):
        if torch.is_grad_enabled() or not is_student:
            found.append(size)

    base.get_decoder().layers[0].register_forward_pre_hook(
        lambda layer, args: add(tokens, args[0].shape[:2].numel())
    )
    for tower in [part for part in base.modules() if "Vision" in type(part).__name__][:1]:
        tower.register_forward_pre_hook(
            lambda module, args, kwargs: add(
                pictures, len(args[0] if args else kwargs["pixel_values"])
            ),
            with_kwargs=True,
        )
    return tokens, pictures


def finish(trainer, recorder, teachers=None, resume=None):
    sides = [trainer.model, *(teachers or [trainer.teacher_model])]
    shapes = [watch(model) for model in sides]
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder, shapes


def run(folder, family="qwen3", rows=None, peft_config=None, eval_dataset=None, **fields):
    resume = fields.pop("resume", None)
    recorder = GradientRecorder()
    has_pictures = family not in ("qwen3", "llama")
    rows = rows or tiny_rows(4, images="mixed" if has_pictures else 0)
    trainer = GOLDTrainer(
        model=tiny(family)[0],
        teacher_model=tiny(family, "teacher")[0],
        args=GOLDConfig(output_dir=str(folder), **(FIELDS | THREE_OF_TWO | fields)),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tiny(family)[1],
        peft_config=peft_config,
        callbacks=[recorder],
    )
    return finish(trainer, recorder, resume=resume)


def assert_shared(plain, shared, times=3):
    """The same losses and gradients, of models that have seen fewer tokens and pictures."""
    (trainer, recorder, seen), (trainer_2, recorder_2, seen_2) = plain, shared
    torch.testing.assert_close(losses_of(trainer_2), losses_of(trainer), rtol=1e-5, atol=1e-6)
    assert_equal_steps(recorder_2, recorder)
    for (tokens, pictures), (tokens_2, pictures_2) in zip(seen, seen_2, strict=True):
        assert sum(tokens_2) < 0.75 * sum(tokens)
        assert sum(pictures) == times * sum(pictures_2)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen3", {}),
        ("qwen3_vl", {"gradient_checkpointing": True, "peft_config": LORA}),
        ("smolvlm", {"max_steps": 1}),
    ],
)
def test_loss_and_gradient_are_those_of_rows_with_a_prompt_each(family, fields, tmp_path):
    plain = run(tmp_path, family, share_prompts=False, **fields)
    assert plain[2][0][1] or family == "qwen3", "the tower is watched"
    assert_shared(plain, run(tmp_path, family, share_prompts=True, **fields))


def test_each_of_two_families_shares_its_own_prompts(tmp_path):
    def across(**fields):
        sides = make_sides("qwen3_vl", "smolvlm")
        rows = tiny_rows(2, images="mixed")
        fields = THREE_OF_TWO | {"max_steps": 1, "max_completion_length": 8} | fields
        return finish(*cross_trainer(tmp_path, rows, *sides, **fields))

    assert_shared(across(), across(share_prompts=True))


def test_each_of_several_teachers_shares_the_prompts_of_its_rows(tmp_path):
    for seed, key in enumerate(("one", "two")):
        save_tiny(tmp_path / key, "qwen3", "teacher", seed=seed)
    rows = [
        row | {"teacher_id": key} for row, key in zip(tiny_rows(2), ("one", "two"), strict=True)
    ]

    def several(**fields):
        recorder = GradientRecorder()
        paths = {key: str(tmp_path / key) for key in ("one", "two")}
        fields = FIELDS | THREE_OF_TWO | {"max_steps": 1, "teacher_models": paths} | fields
        trainer = GOLDTrainer(
            model=tiny("qwen3")[0],
            args=GOLDConfig(output_dir=str(tmp_path / "run"), **fields),
            train_dataset=rows,
            processing_class=tiny("qwen3")[1],
            callbacks=[recorder],
        )
        teachers = [teacher.model for teacher in trainer.teacher.teachers.values()]
        return finish(trainer, recorder, teachers)

    assert_shared(several(), several(share_prompts=True))


def test_a_pass_of_the_teacher_over_several_micro_batches_has_a_prompt_once(tmp_path):
    halves = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    fields = halves | {"num_generations": 6, "max_steps": 1}
    plain = run(tmp_path, share_prompts=False, **fields)
    merged = run(tmp_path, share_prompts=True, teacher_batch_size=6, **fields)
    assert_shared(plain, merged)
    (apart, _), (together, _) = run(tmp_path, share_prompts=True, **fields)[2][1], merged[2][1]
    assert len(together) == 2 + 1 and sum(together) < sum(apart)


def test_rows_that_are_packed_share_their_prompts(tmp_path):
    packed = run(tmp_path, padding_free=True)
    assert_shared(run(tmp_path), packed)
    alone = run(tmp_path, padding_free=True, share_prompts=False)
    assert sum(alone[2][0][0]) > sum(packed[2][0][0]), "unless that is not wanted"


def test_a_teacher_that_sees_another_context_shares_its_own_prompts(tmp_path):
    rows = tiny_rows(2, images=1)
    hint = {"type": "text", "text": "It is red. What is it?"}
    rows[0]["teacher_messages"] = [{"role": "user", "content": [{"type": "image"}, hint]}]
    fields = {"family": "qwen3_vl", "rows": rows, "max_steps": 1}
    plain = run(tmp_path, share_prompts=False, **fields)
    shared = run(tmp_path, share_prompts=True, **fields)
    assert_shared(plain, shared)
    (student, _), (teacher, _) = shared[2]
    assert teacher[-1] > student[-1], "the hint is longer than what stands in its place"


def test_the_second_look_of_a_teacher_shares_prompts_too(tmp_path):
    """At pictures without detail: a prompt's completions have one of them."""
    rows = tiny_rows(2, images=1)
    fields = {"rows": rows, "max_steps": 1, "token_weighting": "picture_detail"}
    plain = run(tmp_path, "qwen3_vl", share_prompts=False, **fields)
    shared = run(tmp_path, "qwen3_vl", share_prompts=True, **fields)
    assert_shared(plain, shared)
    _, (tokens, _) = shared[2]
    assert tokens[-1] == tokens[-2], "both looks are at as many tokens"


def test_a_resumed_run_goes_on_with_or_without_it(tmp_path):
    fields = {"save_strategy": "steps", "save_steps": 1}
    whole, *_ = run(tmp_path / "whole", share_prompts=True, **fields)
    first = str(tmp_path / "whole" / "checkpoint-1")
    for shares in (True, False):
        trainer, *_ = run(tmp_path / "whole", share_prompts=shares, resume=first, **fields)
        assert losses_of(trainer)[-1] == pytest.approx(losses_of(whole)[-1], rel=1e-5)


def test_where_no_prompt_comes_twice_rows_are_padded(tmp_path):
    fields = {"per_device_train_batch_size": 2, "num_generations": 1, "lmbda": 0.0}
    rows = tiny_rows(4)
    trainer, _, ((tokens, _), _) = run(tmp_path, rows=rows, share_prompts=True, **fields)
    assert tokens == run(tmp_path, rows=rows, **fields)[2][0][0]
    assert not trainer.inputs.passes.window[0].shares_prompts


def test_an_evaluation_pads_rows_that_begin_alike(tmp_path):
    rows = tiny_rows(2) * 2
    fields = {"eval_dataset": rows, "max_length": None}
    trainer, _, ((_, _), (tokens, _)) = run(tmp_path, share_prompts=True, **fields)
    del tokens[:]
    loss = trainer.evaluate()["eval_loss"]
    plain, _, (_, (tokens_2, _)) = run(tmp_path, share_prompts=False, **fields)
    del tokens_2[:]
    assert plain.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert tokens == tokens_2


def test_compiled_layers_take_any_numbers_of_prompts_and_lengths(graphs, tmp_path):
    rows = with_lengths(tiny_rows(6), (3, 9, 5, 14, 11, 2))
    rows[4]["messages"][0] = rows[5]["messages"][0]  # a step of one prompt
    fields = {"max_steps": 3, "rows": rows, "lmbda": 0.0}
    compiled = run(tmp_path, share_prompts=True, compile_models="regional", **fields)
    kinds = compiled[0].fast.compiled.kinds
    assert all(kind.is_compiled for kind in kinds)
    assert len(graphs) == 2 * len(kinds), "one for the first step, one for all others"
    assert_shared(run(tmp_path, share_prompts=False, **fields), compiled)


def refusal(folder, **options):
    with pytest.raises(ValueError) as error:
        run(folder, share_prompts=True, **options)
    return str(error.value)


def test_models_whose_rows_cannot_share_a_sequence_are_refused(tmp_path):
    message = refusal(tmp_path, family="gemma3")
    assert message.startswith(
        "GOLDTrainer: share_prompts must be False for models whose rows cannot share a sequence, "
        "got True and a student of the type gemma3;"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm", "two tokenizers"])
def test_on_a_gpu_prompts_of_rollouts_are_shared_without_being_asked_for(family, caplog, tmp_path):
    on_gpu = {"use_cpu": False, "bf16": True, "max_steps": 1}
    on_gpu |= {"compile_models": "off", "rollout_compile": False}

    def rolled(**fields):
        fields = on_gpu | fields
        if family != "two tokenizers":
            return run(tmp_path, family, **fields)
        sides = make_sides("qwen3_vl", "smolvlm")
        rows = tiny_rows(2, images="mixed")
        return finish(*cross_trainer(tmp_path, rows, *sides, **THREE_OF_TWO | fields))

    (plain, recorder, _), (trainer, recorder_2, _) = rolled(share_prompts=False), rolled()
    assert trainer.inputs.passes.window[0].shares_prompts
    assert not plain.inputs.passes.window[0].shares_prompts
    assert losses_of(trainer) == pytest.approx(losses_of(plain), rel=5e-3)
    gradients = [
        torch.cat([gradient.flatten() for gradient in own.gradients.values()])
        for own in (recorder, recorder_2)
    ]
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()
    assert "log-probabilities of rollouts should be" not in caplog.text

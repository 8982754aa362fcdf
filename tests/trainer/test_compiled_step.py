"""Compiled layers learn what the others learn, share a piece of code, and are gone outside of a
step.
"""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback

from gold_trainer import GOLDConfig, GOLDTrainer
from gold_trainer.speed import compiling
from gold_trainer.teachers.layer_stream import outermost_lists
from support.tiny_models import tiny, tiny_rows, with_lengths
from support.trainer_cases import (
    FIELDS,
    GradientRecorder,
    assert_equal_steps,
    losses_of,
    make_trainer,
)

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def layers_of(*models):
    return [layer for model in models for _, part in outermost_lists(model) for layer in part]


def run(folder, family="qwen3", num_steps=2, lengths=None, **fields):
    torch.manual_seed(0)
    rows = tiny_rows(4 * num_steps, **({} if family == "qwen3" else {"images": "mixed"}))
    if lengths is not None:
        with_lengths(rows, lengths)
    recorder = GradientRecorder()
    trainer = make_trainer(
        folder, rows, family, max_steps=num_steps, callbacks=[recorder], **fields
    )
    trainer.train()
    return trainer, recorder


def assert_same_run(one, other, tolerance=1e-5):
    (trainer, recorder), (trainer_2, recorder_2) = one, other
    torch.testing.assert_close(losses_of(trainer), losses_of(trainer_2), rtol=1e-5, atol=1e-6)
    assert_equal_steps(recorder_2, recorder, tolerance)


@pytest.mark.parametrize(
    ("family", "backend", "fields"),
    [
        ("qwen3_vl", "aot_eager", {"gradient_checkpointing": True, "peft_config": LORA}),
        ("qwen3", None, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    ],
)
def test_a_compiled_step_has_the_losses_and_gradients_of_one_that_is_not(
    family, backend, fields, monkeypatch, graphs, tmp_path
):
    expected = run(tmp_path, family, compile_models="off", **fields)
    assert not graphs
    if backend is not None:
        monkeypatch.setattr(compiling, "BACKEND", backend)
    actual = run(tmp_path, family, compile_models="regional", **fields)
    compiled = actual[0].fast.compiled
    assert compiled.note.all_seconds > 0
    assert all(kind.is_compiled for kind in compiled.kinds)
    assert len(compiled.kinds) == (4 if family == "qwen3_vl" else 2), "the vision towers' too"
    assert_same_run(expected, actual)


def test_a_student_that_is_its_own_teacher_is_compiled_with_and_without_its_adapter(
    graphs, tmp_path
):
    def own(mode):
        torch.manual_seed(0)
        recorder = GradientRecorder()
        student, processor = tiny("qwen3")
        trainer = GOLDTrainer(
            model=student,
            args=GOLDConfig(output_dir=str(tmp_path), **FIELDS, compile_models=mode),
            train_dataset=tiny_rows(8),
            processing_class=processor,
            peft_config=LORA,
            callbacks=[recorder],
        )
        trainer.train()
        return trainer, recorder

    assert_same_run(own("off"), own("regional"))
    assert len(graphs) == 3, "the first layer's input, of frozen embeddings, needs no gradient"


@pytest.mark.parametrize("padding_free", [False, True])
def test_layers_of_a_kind_share_their_code_whatever_the_lengths(padding_free, graphs, tmp_path):
    lengths = [n for step in (3, 9, 5, 14, 11) for n in [step] * 4]
    fields = {"compile_models": "regional", "padding_free": padding_free}
    trainer, _ = run(tmp_path, num_steps=5, lengths=lengths, **fields)
    kinds = trainer.fast.compiled.kinds
    assert [kind.name for kind in kinds] == [
        "Qwen3DecoderLayer of the student",
        "Qwen3DecoderLayer of the teacher",
    ]
    assert all(len(kind.layers) > 1 and kind.is_compiled for kind in kinds)
    assert len(graphs) == 2 * len(kinds), "one for the first length, one for all others"


def test_a_model_that_was_asked_for_hidden_states_is_compiled_all_the_same(graphs, tmp_path):
    student, ids = tiny("qwen3")[0], torch.tensor([[5, 6, 7]])
    student(input_ids=ids, output_hidden_states=True)
    (attention,) = {type(layer.self_attn) for layer in layers_of(student)}
    seen, forward = [], attention.forward

    def watched(self, *args, **kwargs):
        seen.append(len(self._forward_hooks))
        return forward(self, *args, **kwargs)

    hooks = [layer.self_attn._forward_hooks for layer in layers_of(student)]
    assert all(hooks)
    attention.forward = watched
    try:
        trainer, _ = run(tmp_path, num_steps=1, student=student, compile_models="regional")
    finally:
        attention.forward = forward
    assert all(kind.is_compiled for kind in trainer.fast.compiled.kinds) and graphs
    assert 0 in seen
    assert [layer.self_attn._forward_hooks for layer in layers_of(student)] == hooks
    assert len(student(input_ids=ids, output_hidden_states=True).hidden_states) > 1


class Watch(TrainerCallback):
    """Whether layers are compiled where a step begins, ends, is evaluated and saved."""

    def __init__(self, layers):
        self.layers, self.seen = layers, []

    def look(self, *args, **kwargs):
        self.seen += ["forward" in vars(layer) for layer in self.layers]

    on_step_begin = on_step_end = on_evaluate = on_save = look


def test_outside_of_a_step_layers_are_as_they_were(graphs, tmp_path):
    student, teacher = tiny("qwen3")[0], tiny("qwen3", "teacher")[0]
    watch, names = Watch(layers_of(student, teacher)), list(student.state_dict())
    trainer = make_trainer(
        *(tmp_path, tiny_rows(8), "qwen3"),
        student=student,
        teacher=teacher,
        eval_rows=tiny_rows(2),
        callbacks=[watch],
        compile_models="regional",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        lmbda=1.0,
    )
    trainer.train()
    assert graphs and watch.seen and not any(watch.seen)
    assert list(student.state_dict()) == names
    found = len(graphs)
    trainer.evaluate()
    assert len(graphs) == found


def test_layers_that_cannot_be_compiled_are_named_once_and_run_as_they_are(
    graphs, monkeypatch, caplog, tmp_path
):
    expected = run(tmp_path, compile_models="off")
    kind = type(layers_of(expected[0].model)[0].mlp)
    forward = kind.forward

    def broken(self, hidden):
        torch._dynamo.graph_break()
        return forward(self, hidden)

    monkeypatch.setattr(kind, "forward", broken)
    actual = run(tmp_path, compile_models="regional", gradient_checkpointing=True)
    assert_same_run(expected, actual)
    told = [r.getMessage() for r in caplog.records if "without being compiled" in r.getMessage()]
    assert len(told) == 2, "student and teacher"
    start = "GOLDTrainer: Qwen3DecoderLayer of the teacher runs without being compiled, which costs"
    assert told[0].startswith(start)


def test_a_model_that_comes_in_parts_is_named_and_runs_as_it_is(graphs, caplog, tmp_path):
    trainer, _ = run(tmp_path, compile_models="regional", teacher_offload="cpu")
    assert [kind.name for kind in trainer.fast.compiled.kinds] == [
        "Qwen3DecoderLayer of the student"
    ]
    assert (
        "GOLDTrainer: the teacher's layers run without being compiled: they come to the device one "
        "after the other." in caplog.text
    )


def test_layers_that_the_user_has_compiled_are_left_to_him(graphs, tmp_path):
    student = tiny("qwen3")[0]
    for layer in layers_of(student):
        layer.compile(backend="eager")
    trainer, _ = run(tmp_path, student=student, compile_models="regional")
    assert [kind.name for kind in trainer.fast.compiled.kinds] == [
        "Qwen3DecoderLayer of the teacher"
    ]


def test_layers_with_a_forward_of_their_own_are_named_and_left_alone(graphs, caplog, tmp_path):
    def halved(mode):
        torch.manual_seed(0)
        student, calls = tiny("qwen3")[0], []
        for layer in layers_of(student):

            def own(*args, forward=layer.forward, **kwargs):
                calls.append(forward)
                return 0.5 * forward(*args, **kwargs)

            layer.forward = own
        return run(tmp_path, student=student, compile_models=mode), calls

    (expected, calls), (actual, calls_2) = halved("off"), halved("regional")
    assert_same_run(expected, actual)
    assert len(calls) == len(calls_2) > 0
    compiled = actual[0].fast.compiled
    assert [kind.name for kind in compiled.kinds] == ["Qwen3DecoderLayer of the teacher"]
    told = [r.getMessage() for r in caplog.records if "without being compiled" in r.getMessage()]
    assert told == [
        "GOLDTrainer: 2 layers (Qwen3DecoderLayer of the student) run without being compiled: they "
        "have a forward of their own."
    ]


class HookAtStep(TrainerCallback):
    def __init__(self, module, step):
        self.module, self.step = module, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.module.register_forward_hook(lambda module, args, output: 0.5 * output)


@pytest.mark.parametrize("step", [0, 1])
def test_hooks_in_layers_run_whenever_they_came(step, graphs, tmp_path):
    def losses(mode):
        torch.manual_seed(0)
        student = tiny("qwen3")[0]
        hook = HookAtStep(layers_of(student)[-1].mlp, step)
        fields = {"student": student, "compile_models": mode, "callbacks": [hook]}
        trainer = make_trainer(tmp_path, tiny_rows(8), "qwen3", max_steps=2, **fields)
        trainer.train()
        assert all(kind.is_compiled for kind in trainer.fast.compiled.kinds)
        return losses_of(trainer)

    torch.testing.assert_close(losses("regional"), losses("off"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 2])
def test_layers_that_need_many_pieces_of_code_have_as_many_as_the_user_allows(
    limit, graphs, monkeypatch, caplog, tmp_path
):
    monkeypatch.setattr(compiling, "LIMIT", 1)
    student, seen = tiny("qwen3")[0], []
    for number, layer in enumerate(layers_of(student)):  # each is code of its own
        layer.mlp.register_forward_hook(lambda *call, number=number: seen.append(number))
    with torch._dynamo.config.patch(recompile_limit=limit):
        trainer, _ = run(tmp_path, num_steps=1, student=student, compile_models="regional")
    assert set(seen) == {0, 1}
    assert trainer.fast.compiled.kinds[0].is_compiled == (limit == 2)
    told = (
        "Qwen3DecoderLayer of the student runs without being compiled, which costs time: its "
        "layers need more than 1 pieces of code, as hooks or settings differ from layer to layer "
        "or from step to step; raise torch._dynamo.config.recompile_limit, or set "
        "compile_models='off'."
    )
    assert (told in caplog.text) == (limit == 1)


def test_an_error_of_the_layer_itself_is_raised(graphs, monkeypatch, tmp_path):
    def fail(self, hidden):
        raise RuntimeError("the layer's own")

    trainer = make_trainer(tmp_path, tiny_rows(4), "qwen3", compile_models="regional")
    assert isinstance(layers_of(trainer.model)[0].mlp, nn.Module)
    monkeypatch.setattr(type(layers_of(trainer.model)[0].mlp), "forward", fail)
    with pytest.raises(RuntimeError, match="the layer's own"):
        trainer.train()


def test_on_a_cpu_layers_are_compiled_where_it_is_asked_for_alone(graphs, tmp_path):
    trainer, _ = run(tmp_path, num_steps=1)
    assert trainer.args.compile_models is None
    assert not trainer.fast.compiled.kinds and not graphs

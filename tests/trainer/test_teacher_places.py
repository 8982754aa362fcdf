"""Where the teacher's weights are: what cannot be, and a teacher on a device of its own."""

from types import SimpleNamespace

import peft
import pytest
import torch
from torch._subclasses import FakeTensorMode

from gold_trainer import GOLDConfig, GOLDTrainer
from gold_trainer.batches import SideInputs
from gold_trainer.refusals import refuse_places
from gold_trainer.teachers import FrozenTeacher
from gold_trainer.writers.local import _reason_to_generate
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import FIELDS, losses_of, make_trainer

BESIDE_DEVICE_MAP = ("teacher_sharding", "teacher_device", "teacher_offload")
SAMPLING = SimpleNamespace(generation_kwargs={})
VALUES = {"teacher_sharding": "fsdp", "teacher_device": "cpu", "teacher_offload": "cpu"}


def config(tmp_path, **fields):
    return GOLDConfig(output_dir=str(tmp_path), **(FIELDS | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_sharding": "zero3"}, "teacher_sharding must be None or 'fsdp', got 'zero3'"),
        ({"teacher_offload": "disc"}, "did you mean 'disk'"),
        ({"teacher_device": "cuda:99"}, r"teacher_device must be one of cpu.*, got 'cuda:99'"),
        ({"teacher_device": "meta"}, r"teacher_device must be one of cpu.*, got 'meta'"),
        ({"teacher_device": "gpu"}, r"teacher_device must be one of cpu.*, got 'gpu'"),
        (
            {"teacher_sharding": "fsdp", "teacher_offload": "cpu"},
            "teacher_offload must be None with teacher_sharding, got 'cpu'",
        ),
        (
            {"teacher_sharding": "fsdp", "teacher_device": "cpu"},
            "teacher_device must be None with teacher_sharding, got 'cpu'",
        ),
        *(
            ({"teacher_model_init_kwargs": {name: value}}, f"must be without {name}, got")
            for name, value in (
                ("tp_plan", "auto"),
                ("tp_size", 2),
                ("device_mesh", None),
                ("distributed_config", {"fsdp_size": 2}),
            )
        ),
        ({"teacher_model_init_kwargs": '{"tp_plan": "auto"}'}, "set teacher_sharding='fsdp'"),
        *(
            (
                {name: VALUES[name], "teacher_model_init_kwargs": {"device_map": "auto"}},
                f"without device_map where {name} is set, got 'auto'",
            )
            for name in BESIDE_DEVICE_MAP
        ),
    ],
)
def test_a_config_refuses_places_that_there_are_not(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


@pytest.mark.parametrize("name", BESIDE_DEVICE_MAP)
def test_a_student_that_is_its_own_teacher_has_no_place_for_it(name, tmp_path):
    student, processor = tiny("qwen3")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=f"{name} must be None for a student that is its own"):
        GOLDTrainer(
            model=student,
            args=config(tmp_path, **{name: VALUES[name]}),
            train_dataset=tiny_rows(2, images=0),
            processing_class=processor,
            peft_config=lora,
        )


def test_several_processes_do_not_share_a_device_and_one_shards_nothing():
    places = dict.fromkeys(BESIDE_DEVICE_MAP) | {"teacher_cache": None}
    args = SimpleNamespace(**places | {"teacher_device": "cuda:1"}, world_size=2)
    with pytest.raises(ValueError, match=r"teacher_device must be None with 2 processes, got 'cu"):
        refuse_places("a/teacher", args)
    args.teacher_cache = "x"  # whose rows processes share: sharding is refused there
    with pytest.raises(ValueError, match="all of them would fill; leave it out, or start one proc"):
        refuse_places("a/teacher", args)
    args = SimpleNamespace(**places | {"teacher_sharding": "fsdp"}, world_size=1)
    with pytest.raises(ValueError, match=r"teacher_sharding must be None with one process, got 'f"):
        refuse_places("a/teacher", args)


def test_a_device_of_its_own_gives_the_same_losses(tmp_path):
    rows = tiny_rows(4, images=1)
    losses = []
    for device in (None, "cpu"):
        trainer = make_trainer(tmp_path, rows, teacher_device=device, seq_kd=True)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == losses[1]


def test_the_one_cpu_has_two_names(tmp_path):
    """Several processes call it cpu:0: nothing is copied there."""
    frozen = FrozenTeacher(*tiny("llama", "teacher"), config(tmp_path))
    frozen.place(torch.device("cpu:0"))
    assert frozen.side.head is frozen.model.lm_head
    assert not hasattr(frozen.model, "_hf_hook")


@pytest.mark.parametrize("has_bias", [False, True])
def test_inputs_go_to_the_teachers_device_and_hidden_states_come_back(has_bias, tmp_path):
    """Fake tensors: an operator on two devices is an error, as it is on GPUs."""
    teacher, tokenizer = tiny("llama", "teacher")
    if has_bias:
        teacher.lm_head.bias = torch.nn.Parameter(torch.zeros(teacher.lm_head.out_features))
    frozen = FrozenTeacher(teacher, tokenizer, config(tmp_path))
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        for module in teacher.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = fake_parameter(fakes, parameter)
            for name, buffer in module._buffers.items():
                module._buffers[name] = fakes.from_tensor(buffer).to("cuda:1")
        frozen.meet(torch.device("cuda:0"))
        frozen.side.form.is_measured = True
        ids = torch.zeros(2, 5, dtype=torch.int64, device="cuda:0")
        rows = torch.tensor([0, 3, 7], device="cuda:0")
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs = SideInputs(examples=[], tensors=tensors, scored_rows=rows, labels=rows)
        hidden = frozen.hidden_rows(inputs)
    devices = {str(parameter.device) for parameter in teacher.parameters()}
    assert devices == {"cuda:1"}
    assert "another device" in _reason_to_generate(frozen.model, SAMPLING)
    assert hidden.shape == (3, 128) and str(hidden.device) == "cuda:0"
    head = frozen.side.head
    assert [str(t.device) for t in (head.weight, head.bias) if t is not None] == ["cuda:0"] * (
        1 + has_bias
    )


def fake_parameter(fakes, parameter):
    return torch.nn.Parameter(fakes.from_tensor(parameter.detach()).to("cuda:1"), False)


def test_the_current_gpu_has_two_names(tmp_path, monkeypatch):
    """accelerate calls it cuda: nothing is copied there, and writers see a plain model."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    teacher, tokenizer = tiny("llama", "teacher")
    frozen = FrozenTeacher(teacher, tokenizer, config(tmp_path))
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        teacher.lm_head.weight = fake_parameter(fakes, teacher.lm_head.weight)
        frozen.meet(torch.device("cuda"))
        assert frozen.side.head is teacher.lm_head and not hasattr(teacher, "_hf_hook")
        frozen.meet(torch.device("cuda:0"))
        assert frozen.side.head is not teacher.lm_head and hasattr(teacher, "_hf_hook")


@pytest.mark.gpu
@pytest.mark.parametrize("seq_kd", [False, True])
def test_on_a_gpu_a_teacher_may_be_on_another_device(seq_kd, tmp_path):
    losses = []
    for device in (None, "cpu"):
        trainer = make_trainer(
            tmp_path / str(device),
            tiny_rows(4, images="mixed"),
            teacher_device=device,
            seq_kd=seq_kd,
            top_k=1,
            use_cpu=False,
            bf16=False,
        )
        trainer.train()
        losses.append(losses_of(trainer))
    assert {p.device.type for p in trainer.teacher_model.parameters()} == {"cpu"}
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

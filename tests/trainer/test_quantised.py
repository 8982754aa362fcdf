"""Models in 8 and 4 bits, whose heads stay whole."""

import copy
import json
from types import SimpleNamespace

import peft
import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import AutoModelForCausalLM

from gold_trainer import GOLDConfig, GOLDTrainer, sharding
from gold_trainer.__main__ import main
from gold_trainer.quantised import dequantised, read_quantization
from support.tiny_models import save_tiny, tiny, tiny_rows
from support.trainer_cases import FIELDS, losses_of, make_trainer

NAME = "quantization_config"
IN_4_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
IN_8_BITS = {"load_in_8bit": True}
BY_TORCHAO = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
# LLM.int8 rounds what comes into a layer too; 4 bits are computed in bfloat16 on some CPUs
KINDS = {"4 bits": (IN_4_BITS, 2e-3), "8 bits": (IN_8_BITS, 1e-2), "torchao": (BY_TORCHAO, 1e-5)}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher's: of a width that all libraries take."""
    folder = tmp_path_factory.mktemp("teacher")
    return save_tiny(folder, "qwen3", "teacher")


def train(folder, **options):
    trainer = make_trainer(folder, tiny_rows(6, images=0), "qwen3", **options)
    trainer.train()
    return trainer


def quantised(folder, quantization):
    config = read_quantization("", quantization)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def rounded(folder, model):
    """The model of the folder with the weights that the quantised one computes with. To be asked
    for before it runs: bitsandbytes then packs its weights once more, on a CPU.
    """
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for name, module in model.named_modules():
        weight = dequantised(module)
        if weight is not None:
            plain.get_submodule(name).weight = nn.Parameter(weight.float())
    return plain


def is_head_plain(model):
    head = model.get_output_embeddings()
    return type(head) is nn.Linear and type(head.weight) is nn.Parameter


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_gives_the_losses_of_one_with_the_same_weights(kind, folder, tmp_path):
    quantization, rel = KINDS[kind]
    given = {"teacher_model_init_kwargs": json.dumps({NAME: quantization})}
    trainer = train(tmp_path / "quantised", teacher=str(folder), **given)
    layer = trainer.teacher_model.model.layers[0].mlp.up_proj
    assert dequantised(layer) is not None
    assert is_head_plain(trainer.teacher_model)
    plain = rounded(folder, quantised(folder, quantization))
    assert not plain.model.layers[0].mlp.up_proj.weight.equal(
        tiny("qwen3", "teacher")[0].model.layers[0].mlp.up_proj.weight
    )
    expected = train(tmp_path / "plain", teacher=plain)
    assert losses_of(trainer) == pytest.approx(losses_of(expected), rel=rel)


@pytest.mark.parametrize(
    "quantization",
    [
        {**IN_4_BITS, "llm_int8_skip_modules": ["model.layers.0.self_attn.o_proj"]},
        {**IN_8_BITS, "llm_int8_skip_modules": []},
        {**BY_TORCHAO, "modules_to_not_convert": ["model.layers.0.self_attn.o_proj"]},
    ],
)
def test_a_list_of_what_is_left_out_has_the_head_too(quantization, folder, tmp_path):
    given = {"teacher_model_init_kwargs": {NAME: quantization}}
    trainer = train(tmp_path, teacher=str(folder), seq_kd=True, **given)
    assert is_head_plain(trainer.teacher_model)
    left = dequantised(trainer.teacher_model.model.layers[0].self_attn.o_proj) is None
    assert left == ("o_proj" in str(quantization))


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_head_that_is_quantised_is_made_whole_once(bits, folder, tmp_path, caplog):
    teacher = quantised(folder, {f"load_in_{bits}": True, "llm_int8_skip_modules": ["mlp"]})
    assert not is_head_plain(teacher)
    plain = rounded(folder, teacher)
    trainer = train(tmp_path / "quantised", teacher=teacher)
    assert "the teacher's lm_head is quantised; the loss takes it as float32" in caplog.text
    assert is_head_plain(trainer.teacher_model)
    expected = train(tmp_path / "plain", teacher=plain)
    assert losses_of(trainer) == pytest.approx(losses_of(expected), rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_on_a_quantised_student_and_saved(kind, folder, tmp_path):
    """Half on-policy; with its activations computed again; the weights below stay."""
    losses, options = [], {"model_init_kwargs": {NAME: KINDS[kind][0]}, "learning_rate": 0.1}
    for is_checkpointed in (False, True):
        trainer = train(
            tmp_path / str(is_checkpointed),
            student=str(folder),
            peft_config=peft.LoraConfig(**LORA),
            gradient_checkpointing=is_checkpointed,
            lmbda=0.5,
            max_steps=2,
            **options,
        )
        losses.append(losses_of(trainer))
    assert losses[0] == losses[1]
    base = trainer.model.get_base_model()
    head = base.get_output_embeddings()
    assert is_head_plain(base) and head.weight.dtype == torch.bfloat16
    assert dequantised(base.model.layers[0].self_attn.o_proj) is not None
    trainer.save_model()
    loaded = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "True"
    )
    saved = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == len(saved) > 0
    assert all(torch.equal(saved[name], p) for name, p in trained.items())


def test_a_quantised_student_may_be_its_own_teacher_and_goes_on_from_a_checkpoint(folder, tmp_path):
    options = {
        "student": str(folder),
        "peft_config": peft.LoraConfig(**LORA),
        "model_init_kwargs": {NAME: IN_8_BITS},
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 2,
        "has_teacher": False,
    }
    trainer = own_teacher(tmp_path, **options)
    trainer.train()
    expected = losses_of(trainer)
    trainer = own_teacher(tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert losses_of(trainer) == expected and expected[0] > 0


def own_teacher(folder, student, peft_config, has_teacher, **fields):
    return GOLDTrainer(
        model=student,
        args=GOLDConfig(output_dir=str(folder), **(FIELDS | fields)),
        train_dataset=tiny_rows(6, images=0),
        peft_config=copy.deepcopy(peft_config),
    )


def test_a_quantised_student_needs_an_adapter(folder, tmp_path):
    with pytest.raises(ValueError, match="a student in 8 or 4 bits must have an adapter, got none"):
        train(tmp_path, student=str(folder), model_init_kwargs={NAME: IN_8_BITS})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"load_in_4bits": True}, "must hold load_in_4bit, load_in_8bit or a quant_method, got"),
        ({**IN_4_BITS, "bnb_4bit_type": "nf4"}, "did you mean bnb_4bit_quant_type"),
        ({**IN_4_BITS, "bnb_4bit_compute_dtype": "bf16"}, "must hold values of its library, got"),
        ({"quant_method": "torchao", "quant_type": "Int8WeightOnly"}, "did you mean Int8Weight"),
        ({"quant_method": "torchao", "quant_type": "x"}, "got 'x'; for instance Int8WeightOnlyC"),
    ],
)
def test_a_quantization_config_that_is_none_is_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        train(tmp_path, teacher="a/teacher", teacher_model_init_kwargs={NAME: given})
    assert "teacher_model_init_kwargs['quantization_config']" in str(error.value)


@pytest.mark.parametrize("name", ["teacher_sharding", "teacher_offload"])
def test_what_streams_or_shards_weights_takes_none_in_8_bits(name, folder, tmp_path):
    value = {"teacher_sharding": "fsdp", "teacher_offload": "cpu"}[name]
    with pytest.raises(ValueError, match=f"{name} must be None for a teacher in 8 or 4 bits"):
        GOLDConfig(
            output_dir=str(tmp_path),
            teacher_model_init_kwargs={NAME: IN_8_BITS},
            **FIELDS | {name: value},
        )
    if name == "teacher_offload":
        with pytest.raises(ValueError, match=f"{name} is for a teacher whose weights are plain"):
            train(tmp_path, teacher=quantised(folder, IN_8_BITS), **{name: value})


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_engines_that_split_weights_take_no_quantised_student(kind, folder):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    accelerator = SimpleNamespace(
        distributed_type=DistributedType[kind],
        parallelism_config=None,
        state=SimpleNamespace(deepspeed_plugin=plugin),
    )
    with pytest.raises(ValueError, match="under FSDP and ZeRO-3 the student must be in 16 or 32 b"):
        sharding.prepare(accelerator, quantised(folder, IN_8_BITS))


def test_the_command_line_quantises_both_sides(folder, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(4, images=0)))
    flags = {
        "model_name_or_path": folder,
        "teacher_model_name_or_path": folder,
        "model_init_kwargs": json.dumps({NAME: IN_8_BITS}),
        "teacher_model_init_kwargs": json.dumps({NAME: IN_4_BITS}),
        "dataset_name": rows,
        "output_dir": tmp_path / "out",
        **{"max_steps": 1, "lmbda": 0, "use_cpu": True, "report_to": "none", "use_peft": True},
        **{"learning_rate": 1e-3, "bf16": False, "save_strategy": "no"},
    }
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    assert main(["train", *argv]) == 0
    assert (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_both_sides_are_quantised_where_they_train(kind, folder, tmp_path):
    given = {NAME: KINDS[kind][0]}
    expected = losses_of(train(tmp_path / "plain", teacher=str(folder), use_cpu=False, bf16=True))
    for fields in ({}, {"student": str(folder), "model_init_kwargs": given}):
        lora = peft.LoraConfig(**LORA) if fields else None
        trainer = train(
            tmp_path / str(len(fields)),
            teacher=str(folder),
            teacher_model_init_kwargs=given,
            peft_config=lora,
            seq_kd=bool(fields),
            use_cpu=False,
            bf16=True,
            **fields,
        )
        devices = {p.device.type for p in trainer.teacher_model.parameters()}
        assert devices == {"cuda"} == {p.device.type for p in trainer.model.parameters()}
        assert trainer.teacher.side.head is trainer.teacher_model.get_output_embeddings()
        if not fields:
            assert losses_of(trainer)[0] == pytest.approx(expected[0], rel=0.2)

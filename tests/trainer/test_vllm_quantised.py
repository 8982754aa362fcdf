"""A student in 8 or 4 bits, whose adapter alone can go to vLLM."""

import pytest

from gold_trainer.writers.vllm import check as vllm_check
from gold_trainer.writers.vllm.check import connect
from gold_trainer.writers.vllm.engine import EngineWriter
from gold_trainer.writers.vllm.sync import make_sync
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import make_trainer

COLOCATE = {"use_vllm": True, "vllm_mode": "colocate"}
IN_4_BITS = {"quantization_config": {"load_in_4bit": True}}


@pytest.fixture
def stub(stub):
    stub.config["lora_config"] = {"max_lora_rank": 8}
    return stub


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj"], **options)


def quantised():
    """As from_pretrained marks it."""
    model = tiny("qwen3")[0]
    model.quantization_method = "bitsandbytes"
    return model


def args_of(tmp_path, **fields):
    return make_trainer(tmp_path, tiny_rows(4), "qwen3", lmbda=1.0, **fields).args


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"vllm_merge_adapter": True}, "vllm_merge_adapter=True"),
        (COLOCATE, "vllm_mode='colocate', where all weights go over"),
    ],
)
def test_whole_weights_of_a_quantised_student_are_refused(fields, got, stub, tmp_path, monkeypatch):
    """Before models are loaded, and where its files alone say that it is one."""
    monkeypatch.setattr(vllm_check, "find_spec", lambda name: True)
    monkeypatch.setattr(vllm_check, "version", lambda name: "0.32.0")
    args = args_of(tmp_path, **(stub.fields if fields is not COLOCATE else {}), **fields)
    message = f"adapter alone must go to vLLM, got {got}; set vllm_mode='server' and vllm_merge"
    with pytest.raises(ValueError, match=message):
        connect(args, quantised(), lora())
    with pytest.raises(ValueError, match=message):
        make = EngineWriter if fields is COLOCATE else make_sync
        given = (quantised(), None, args) if fields is COLOCATE else (None, None, args, quantised())
        make(*given)
    args.model_init_kwargs = IN_4_BITS
    with pytest.raises(ValueError, match=message):
        connect(args, "some/model", lora())
    args.model_init_kwargs = None
    config = quantised().config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path / "student")  # no weights: they would be read too late
    with pytest.raises(ValueError, match=message):
        connect(args, str(tmp_path / "student"), lora())


def test_a_quantised_student_is_not_told_to_merge(stub, tmp_path):
    args = args_of(tmp_path, **stub.fields)
    stub.config["lora_config"] = None
    with pytest.raises(ValueError, match="must take adapters of rank 4, got none; start it"):
        connect(args, quantised(), lora())
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(quantised(), lora(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="among what is trained; train no more of a student in 8"):
        make_sync(None, None, args, model)

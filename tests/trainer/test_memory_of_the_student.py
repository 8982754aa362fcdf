"""What saves memory of the student: optimizers in 8 bits, paged ones, activations on the host."""

import importlib.util
from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from gold_trainer import sharding
from gold_trainer.fields import optimizers
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import losses_of, make_trainer

RUN = {"max_steps": 3, "learning_rate": 1e-2}


def train(folder, is_resumed=False, **options):
    trainer = make_trainer(folder, tiny_rows(6, images=0), "qwen3", **RUN, **options)
    checkpoint = str(folder / "checkpoint-1") if is_resumed else None
    trainer.train(resume_from_checkpoint=checkpoint)
    return losses_of(trainer)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return train(tmp_path_factory.mktemp("adamw"), optim="adamw_torch")


@pytest.mark.parametrize(
    ("optim", "kind"), [("paged_adamw_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")]
)
def test_an_optimizer_in_8_bits_learns_and_goes_on_from_a_checkpoint(
    optim, kind, expected, tmp_path
):
    options = {"optim": optim, "save_strategy": "steps", "save_steps": 1}
    losses = train(tmp_path, **options)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses != expected
    assert train(tmp_path, is_resumed=True, **options) == losses
    assert optimizers.package_of(optim)[0] == kind


def test_activations_may_wait_in_host_memory(tmp_path):
    options = {"gradient_checkpointing": True}
    losses = [
        train(tmp_path, **options, gradient_checkpointing_kwargs=kwargs)
        for kwargs in (None, {"offload": True}, {"every_n_layers": 2})
    ]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(
    ("optim", "module"),
    [
        ("paged_adamw_8bit", "bitsandbytes"),
        ("adamw_8bit", "bitsandbytes"),
        ("lion_32bit", "bitsandbytes"),
        ("ademamix", "bitsandbytes"),
        ("rmsprop_bnb", "bitsandbytes"),
        ("adamw_torch_4bit", "torchao"),
        ("galore_adamw_8bit", "galore_torch"),
        ("adalomo", "lomo_optim"),
        ("schedule_free_sgd", "schedulefree"),
    ],
)
def test_a_missing_package_shows_before_models_are_loaded(optim, module, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        optimizers, "find_spec", lambda name: None if name == module else find_spec(name)
    )
    with pytest.raises(ValueError, match=f"optim={optim!r} needs the package {module}, which is"):
        train(tmp_path, optim=optim, teacher="no/teacher")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_optimizers_of_torch_and_transformers_need_none(optim):
    assert optimizers.package_of(optim) is None


def test_optimizers_of_bitsandbytes_do_not_update_weights_in_parts():
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP, is_fsdp2=True, parallelism_config=None, state=None
    )
    with pytest.raises(ValueError, match="under FSDP2 optim must not be one of bitsandbytes, got "):
        sharding.prepare(accelerator, tiny("qwen3")[0], "paged_adamw_8bit")

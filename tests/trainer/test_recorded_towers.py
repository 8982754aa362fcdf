"""Towers recorded by CUDA itself: test_towers.py has what needs no GPU."""

import pytest
import torch
from peft import LoraConfig

from gold_trainer.speed import compiling
from support.tiny_models import tiny_rows
from support.trainer_cases import losses_of, make_trainer

ADAPTERS = {"of the text": ["q_proj", "v_proj"], "of text and tower": ["q_proj", "v_proj", "qkv"]}


@pytest.mark.gpu
@pytest.mark.parametrize("where", ADAPTERS)
def test_on_a_gpu_a_tower_is_recorded_unless_it_has_an_adapter(where, tmp_path, monkeypatch):
    """In bf16, for which there is a kernel of attention within pictures."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    losses = {}
    for compiled in ("off", "regional"):
        torch.manual_seed(0)
        trainer = make_trainer(
            *(tmp_path, tiny_rows(1, images=1) * 8, "qwen3_vl"),
            peft_config=LoraConfig(r=2, target_modules=ADAPTERS[where], init_lora_weights=False),
            max_steps=4,
            per_device_train_batch_size=2,
            compile_models=compiled,
            use_cpu=False,
            bf16=True,
        )
        trainer.train()
        losses[compiled] = losses_of(trainer)
    student, teacher = trainer.fast.towers.all
    assert teacher.key is not None, "its sizes of pictures came four times"
    assert (student.key is not None) == (where == "of the text")
    assert losses["regional"] == pytest.approx(losses["off"], rel=1e-2)

"""What is decided before weights are sharded; runs under each engine are in test_engines."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from PIL import Image

from gold_trainer import sharding
from gold_trainer.batches import Example, WindowBatch
from gold_trainer.data.rows import Row
from gold_trainer.demo.tiny_vlm import build_processor
from gold_trainer.rendering.collator import GOLDCollator
from support.tiny_models import tiny


def accelerator_of(kind, **plugins):
    state = SimpleNamespace(**plugins)
    return SimpleNamespace(distributed_type=kind, state=state, parallelism_config=None)


def zero(**options):
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": options})
    return accelerator_of(DistributedType.DEEPSPEED, deepspeed_plugin=plugin)


@pytest.mark.parametrize("options", [{}, {"stage3_gather_16bit_weights_on_model_save": False}])
def test_zero_3_that_could_not_save_a_student_is_refused_before_training(options):
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save=false; set it"):
        sharding.prepare(zero(stage=3, **options), tiny("qwen3")[0])
    sharding.prepare(zero(stage=2, **options), tiny("qwen3")[0])
    whole = {"stage3_gather_16bit_weights_on_model_save": True}
    sharding.prepare(zero(stage=3, **whole), tiny("qwen3")[0])


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"sp_size": 2}])
def test_sequences_that_would_be_cut_apart_are_refused(sizes):
    accelerator = accelerator_of(DistributedType.FSDP)
    accelerator.parallelism_config = ParallelismConfig(**sizes)
    with pytest.raises(ValueError, match=f"{next(iter(sizes))}=2.*set both to 1"):
        sharding.prepare(accelerator, tiny("qwen3")[0])


def test_fsdp_is_told_the_layers_that_a_model_has():
    """The names that come with a model may be those of its whole family."""
    model = tiny("lfm2_vl")[0]
    names = {type(module).__name__ for module in model.modules()}
    assert not set(model._no_split_modules) <= names
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None)
    sharding.prepare(accelerator_of(DistributedType.FSDP, fsdp_plugin=plugin), model)
    assert set(plugin.transformer_cls_names_to_wrap) <= names
    assert any("DecoderLayer" in name for name in plugin.transformer_cls_names_to_wrap)


def test_each_kind_that_only_other_ranks_have_is_run_once():
    """The vision tower runs once for pictures, and once for videos."""
    text = Example(0, "prompt", 1, [], None)
    picture, video = replace(text, images=[object()]), replace(text, videos=[object()])
    both = replace(picture, videos=[object()])
    missing = sharding.missing_media
    assert missing([text, text], [picture, video, picture]) == [picture, video]
    assert missing([text, picture], [picture, video]) == [video]
    assert missing([video], [picture, video]) == [picture]
    assert missing([both], [picture, video]) == missing([text], []) == []


def test_a_template_without_videos_serves_where_no_rank_has_one():
    """Of a processor that takes videos all the same."""
    processor = build_processor()
    collator = GOLDCollator(processor, [processor.tokenizer.eos_token_id], None, [])
    content = [{"type": "image"}, {"type": "text", "text": "."}]
    picture = Row(0, [{"role": "user", "content": content}], None, [Image.new("RGB", (64, 64))])
    accelerator = accelerator_of(DistributedType.FSDP)
    accelerator.device, counts = "cpu", torch.tensor([[2.0, 0.0]])
    accelerator.reduce = lambda flags, reduction: counts
    pictures = sharding.PicturesForAll(accelerator, None, {"student": collator})
    text = Example(0, "prompt", 1, [], None)
    (batch,) = pictures.add([WindowBatch([text], [text])])
    assert [len(example.images) for example in batch.unscored] == [1]
    with_picture = collator.example(picture)
    (batch,) = pictures.add([WindowBatch([with_picture], [with_picture])])
    assert batch.unscored == []


def test_layers_that_the_user_names_are_left_alone():
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=["Mine"])
    accelerator = accelerator_of(DistributedType.FSDP, fsdp_plugin=plugin)
    sharding.prepare(accelerator, tiny("qwen3")[0])
    assert plugin.transformer_cls_names_to_wrap == ["Mine"]

"""What distillation across families refuses, for objects and for names, and samples it leaves out
and counts.
"""

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, SmolVLMForConditionalGeneration

from gold_trainer import GOLDCollator, GOLDConfig, GOLDTrainer
from gold_trainer.data.dataset import RowDataset
from support.cross_cases import (
    Side,
    aligner_of,
    assert_step_is_eager,
    completions_of,
    cross_trainer,
    make_sides,
    rows_of,
    teacher_completion,
)
from support.tiny_models import save_tiny, tiny, tiny_picture
from support.trainer_cases import FIELDS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models with their processors: two families, and one with another tokenizer."""
    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "lfm2_vl", "lfm2_vl")
    save_tiny(root / "qwen3_vl", "qwen3_vl", "teacher")
    save_tiny(root / "llama", "llama")
    save_tiny(root / "llama_other", "llama", "teacher", num_merges=30)
    return {folder.name: str(folder) for folder in root.iterdir()}


def build(tmp_path, student, teacher, rows, *, processors=(None, None), **fields):
    return GOLDTrainer(
        model=student,
        teacher_model=teacher,
        args=GOLDConfig(output_dir=str(tmp_path / "run"), **(FIELDS | fields)),
        train_dataset=rows,
        processing_class=processors[0],
        teacher_processing_class=processors[1],
    )


@pytest.mark.parametrize("is_named", [False, True])
def test_another_family_needs_use_uld_loss(is_named, folders, tmp_path):
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    models = (folders["lfm2_vl"], folders["qwen3_vl"]) if is_named else (student[1], teacher[1])
    processors = (None, None) if is_named else (student.processor, teacher.processor)
    with pytest.raises(
        ValueError,
        match=r"^GOLDTrainer: student and teacher must be of one family, got lfm2_vl and qwen3_vl; "
        "set use_uld_loss=True",
    ):
        build(tmp_path, *models, rows_of("lfm2_vl"), processors=processors)
    assert not (tmp_path / "run").exists()
    build(tmp_path, *models, rows_of("lfm2_vl"), processors=processors, use_uld_loss=True)


@pytest.mark.parametrize("known_by", ["name", "object of a name", "processor", "field"])
def test_another_tokenizer_of_the_same_family_needs_use_uld_loss(known_by, folders, tmp_path):
    student, processor = tiny("llama")
    teacher, other = tiny("llama", "teacher", num_merges=30)
    options = {"processors": (processor, None)}
    if known_by == "name":
        teacher = folders["llama_other"]
    elif known_by == "object of a name":
        teacher = AutoModelForCausalLM.from_pretrained(folders["llama_other"])
    elif known_by == "processor":
        options["processors"] = (processor, other)
    else:
        options["teacher_tokenizer_name_or_path"] = folders["llama_other"]
    rows = rows_of("llama")
    with pytest.raises(
        ValueError,
        match=r"^GOLDTrainer: student and teacher must have one vocabulary, got token .*; "
        "set use_uld_loss=True",
    ):
        build(tmp_path, student, teacher, rows, **options)
    trainer = build(tmp_path, student, teacher, rows, use_uld_loss=True, **options)
    assert trainer.teacher.side.collator.tokenizer.get_vocab() == other.get_vocab()


def test_teacher_of_unknown_origin_needs_its_processor(tmp_path):
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    with pytest.raises(
        ValueError,
        match=r"^GOLDTrainer: use_uld_loss needs the teacher's processor, got .* pass "
        "teacher_processing_class=, or set teacher_tokenizer_name_or_path",
    ):
        cross_trainer(tmp_path, rows_of("lfm2_vl"), student, teacher._replace(processor=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t._replace(processor=t.tokenizer), "a vision-language teacher needs its proc"),
        (lambda t: t.tokenizer.__setattr__("pad_token", None) or t, "the teacher's tokenizer must"),
    ],
)
def test_processor_must_fit_the_teacher(change, message, tmp_path):
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    with pytest.raises(ValueError, match=f"^GOLDTrainer: {message}"):
        cross_trainer(tmp_path, rows_of("lfm2_vl"), student, change(teacher))


@pytest.mark.parametrize(("field", "is_vision"), [("scale_factor", False), ("image_size", True)])
def test_same_family_with_other_image_tokens_needs_use_uld_loss(field, is_vision, tmp_path):
    """Within a family the student's pixels and image tokens are the teacher's too."""
    config = tiny("smolvlm", "teacher")[0].config
    part = config.vision_config if is_vision else config
    before = getattr(part, field)
    setattr(part, field, 2 * before)
    torch.manual_seed(0)
    teacher = SmolVLMForConditionalGeneration(config)
    options = {"processors": (tiny("smolvlm")[1], None)}
    message = f"same pixels and image tokens, got {field} {before} and {2 * before}; set use_uld_lo"
    with pytest.raises(ValueError, match=f"^GOLDTrainer: student and teacher must .* {message}"):
        build(tmp_path, tiny("smolvlm")[0], teacher, rows_of("smolvlm"), **options)
    options = {"processors": (tiny("smolvlm")[1], processor_for(config)), "use_uld_loss": True}
    trainer = build(tmp_path, tiny("smolvlm")[0], teacher, rows_of("smolvlm"), **options)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


def processor_for(config):
    """That of a SmolVLM whose tiles have other sizes or numbers of tokens."""
    processor, size = tiny("smolvlm")[1], config.vision_config.image_size
    processor.image_processor.max_image_size = {"longest_edge": size}
    num_patches = (size // config.vision_config.patch_size) ** 2
    processor.image_seq_len = num_patches // config.scale_factor**2
    return processor


def test_text_and_vision_do_not_mix(tmp_path):
    student, teacher = make_sides("lfm2_vl", "qwen3")
    with pytest.raises(ValueError, match="must take the same inputs, got a vision-language"):
        cross_trainer(tmp_path, rows_of("lfm2_vl"), student, teacher)


def test_collator_of_one_processor_is_refused(tmp_path):
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    with pytest.raises(ValueError, match="data_collator must be None with use_uld_loss, got GOLDC"):
        GOLDTrainer(
            model=student.model,
            teacher_model=teacher.model,
            args=GOLDConfig(output_dir=str(tmp_path), use_uld_loss=True, use_cpu=True),
            data_collator=GOLDCollator(student.processor, [1], None),
            train_dataset=rows_of("lfm2_vl"),
            processing_class=student.processor,
            teacher_processing_class=teacher.processor,
        )


def test_prompt_that_only_the_teacher_cannot_hold_is_named(tmp_path):
    student, teacher = make_sides("qwen2_5_vl", "idefics3")
    rows = rows_of("qwen2_5_vl")
    lengths = [trainer_side_length(side, rows) for side in (student, teacher)]
    assert lengths[0] + 10 < lengths[1]
    trainer, _ = cross_trainer(
        tmp_path, rows, student, teacher, max_length=lengths[1], max_completion_length=4
    )
    with pytest.raises(
        ValueError, match=r"^on the teacher's side, row 0: the prompt has \d+ tokens .* max_length"
    ):
        trainer.train()


def test_conversation_that_only_the_teachers_template_refuses_is_named(tmp_path):
    student, teacher = make_sides("llama", "qwen3")
    refusal = (
        "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif %}"
    )
    teacher.tokenizer.chat_template = refusal + teacher.tokenizer.chat_template
    rows = rows_of("llama")
    rows[2]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    trainer, _ = cross_trainer(tmp_path, rows, student, teacher)
    with pytest.raises(
        ValueError,
        match=r"^on the teacher's side, row 2: the chat template must take .* \['system', 'user'\] "
        r"\(no system\); write what the system's message says into the first user's turn",
    ):
        trainer.train()


def trainer_side_length(side: Side, rows) -> int:
    """Tokens of the longest prompt."""
    collator = GOLDCollator(side.processor, [side.tokenizer.eos_token_id], None)
    dataset = RowDataset(rows, needs_completion=True, is_text=False)
    return max(collator.example(dataset[i]).prompt_length for i in range(len(rows)))


def test_completion_is_cut_where_either_side_is_full(tmp_path):
    """The teacher's prompt leaves room for 9 tokens: what they spell is scored, the rest is not."""
    student, teacher = make_sides("lfm2_vl", "qwen3_vl")
    rows = rows_of("lfm2_vl", count=1)
    room = 9
    max_length = trainer_side_length(teacher, rows) + room
    (ids,) = completions_of(student, rows)
    teacher_ids = teacher_completion(student, teacher, ids)[:room]
    ids = ids[: max_length - trainer_side_length(student, rows)]
    alignment = aligner_of(student, teacher).align(ids, teacher_ids)
    assert 0 < alignment.scored_bytes < alignment.completion_bytes
    parts = [(ids, teacher_ids)], [alignment]
    fields = {"max_length": max_length, "max_completion_length": 2}
    trainer = assert_step_is_eager(tmp_path, (student, teacher), rows, parts, **fields)
    share = alignment.scored_bytes / alignment.completion_bytes
    assert trainer.state.log_history[0]["scored_bytes"] == pytest.approx(share)


@pytest.mark.parametrize("crossentropy_weight", [0.0, 0.5])
def test_text_that_the_teacher_cannot_spell_is_left_out_and_counted(
    crossentropy_weight, tmp_path, caplog
):
    student, teacher = make_sides("llama", "qwen3")
    teacher.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    rows = rows_of("llama", count=4)
    for row in rows[1:3]:
        answer = row["messages"][-1]
        row["messages"] = [*row["messages"][:-1], {**answer, "content": answer["content"].lower()}]
    aligner = aligner_of(student, teacher)
    completions = []
    for row, ids in zip(rows, completions_of(student, rows), strict=True):
        is_spelled = row["messages"][-1]["content"].islower()
        teacher_ids = teacher_completion(student, teacher, ids) if is_spelled else []
        completions.append((ids, teacher_ids))
    alignments = [aligner.align(*pair) for pair in completions]
    assert [alignment.num_groups > 0 for alignment in alignments] == [False, True, True, False]
    trainer = assert_step_is_eager(
        *(tmp_path, (student, teacher), rows, (completions, alignments)),
        {"crossentropy_weight": crossentropy_weight},
        uld_crossentropy_weight=crossentropy_weight,
    )
    assert trainer.state.log_history[0]["skipped_unspelled"] == 2
    assert trainer.state.log_history[0]["skipped_no_common_end"] == 0
    warned = [r for r in caplog.records if "is not distilled" in r.getMessage()]
    assert len(warned) == 1 and "row 0" in warned[0].getMessage()


def test_batch_of_which_nothing_can_be_distilled_has_no_loss_and_no_gradient(tmp_path):
    student, teacher = make_sides("llama", "qwen3")
    teacher.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    trainer, recorder = cross_trainer(tmp_path, rows_of("llama"), student, teacher)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert trainer.state.log_history[0]["skipped_unspelled"] == 3
    assert recorder.gradients and not any(g.any() for g in recorder.gradients.values())


def test_both_sides_hold_the_same_pictures_and_all_turns(tmp_path):
    student, teacher = make_sides("smolvlm", "qwen3_vl")
    image = [{"type": "image"}]
    row = {
        "images": [tiny_picture(0), tiny_picture(1)],
        "messages": [
            {"role": "user", "content": [*image, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A red square."}]},
            {"role": "user", "content": [*image, {"type": "text", "text": "And this?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A green circle."}]},
        ],
    }
    trainer, _ = cross_trainer(tmp_path, [row], student, teacher)
    batch = next(iter(trainer.get_train_dataloader()))
    (example,), (other,) = batch.examples, batch.teacher_examples
    assert all(a is b for a, b in zip(example.images, other.images, strict=True))
    assert len(example.images) == 2
    start = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    assert other.prompt_text == (
        f"{start}What is this?<|im_end|>\n<|im_start|>assistant\nA red square.<|im_end|>\n"
        f"{start}And this?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "im_end" not in example.prompt_text
    assert teacher.tokenizer.decode(other.completion_ids) == "A green circle.<|im_end|>"
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0

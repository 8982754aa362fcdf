"""Processors of student and teacher: what has to be alike, and what is told where it is not."""

import json

import pytest

from gold_trainer import GOLDConfig, GOLDTrainer, loading
from support.tiny_models import save_tiny_pair, tiny, tiny_rows
from support.trainer_cases import FIELDS, make_trainer


def edited(folder, **changes):
    """The teacher's folder with another processor of pictures."""
    path = folder / "teacher" / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"].update(changes)
    path.write_text(json.dumps(config))
    return str(folder / "teacher")


def trainer_of(folder, rows, **fields):
    return GOLDTrainer(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=GOLDConfig(output_dir=str(folder / "run"), **(FIELDS | fields)),
        train_dataset=rows,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, r"got image_mean \[0.48.* and \[0.5, 0.5, 0.5\]"),
        ({"do_normalize": False}, "got do_normalize True and False"),
        ({"rescale_factor": 1.0}, "got rescale_factor 0.00.* and 1.0"),
    ],
)
def test_a_teacher_that_takes_other_pixels_is_refused(changes, message, tmp_path, monkeypatch):
    save_tiny_pair(tmp_path, "qwen3_vl")
    edited(tmp_path, **changes)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_student", None)  # before weights are read
        with pytest.raises(ValueError, match=f"the same pixels of a picture, {message}; set use_"):
            trainer_of(tmp_path, tiny_rows(4, images=1))
    trainer_of(tmp_path, tiny_rows(4, images=1), use_uld_loss=True)  # each side has its own


def test_a_teacher_that_takes_other_sizes_sees_the_students(tmp_path):
    save_tiny_pair(tmp_path, "qwen3_vl")
    edited(tmp_path, size={"shortest_edge": 4096, "longest_edge": 16384})
    trainer_of(tmp_path, tiny_rows(4, images=1))


def test_a_teacher_with_another_chat_template_is_told(tmp_path, caplog):
    save_tiny_pair(tmp_path, "qwen3")
    trainer_of(tmp_path, tiny_rows(4))
    told = "the teacher's chat template is not the student's"
    assert told not in caplog.text
    template = tmp_path / "teacher" / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    trainer_of(tmp_path, tiny_rows(4))
    assert told in caplog.text


def test_a_conversation_without_a_template_is_refused_before_weights_are_read(
    tmp_path, monkeypatch
):
    tokenizer = tiny("qwen3")[1]
    tokenizer.chat_template = None
    monkeypatch.setattr(loading, "load_student", None)
    with pytest.raises(ValueError, match="row 0: a conversation needs a chat template, the stud"):
        make_trainer(tmp_path, tiny_rows(4), "qwen3", processor=tokenizer)


def test_a_processor_is_no_name(tmp_path):
    with pytest.raises(ValueError, match="processing_class must be a tokenizer or a processor, go"):
        make_trainer(tmp_path, tiny_rows(4), "qwen3", processor="qwen3")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_processor_of_another_family_is_refused(side, tmp_path):
    families = {"student": "lfm2_vl", "teacher": "idefics3"}
    processors = {name: tiny(family)[1] for name, family in families.items()}
    wrong = tiny({"student": "smolvlm", "teacher": "lfm2_vl"}[side])[1]
    argument = "processing_class" if side == "student" else "teacher_processing_class"

    def make(given):
        return GOLDTrainer(
            model=tiny("lfm2_vl")[0],
            teacher_model=tiny("idefics3", "teacher")[0],
            args=GOLDConfig(output_dir=str(tmp_path), use_uld_loss=True, **FIELDS),
            train_dataset=tiny_rows(4, images=1),
            processing_class=given["student"],
            teacher_processing_class=given["teacher"],
        )

    message = f"^GOLDTrainer: {argument} must be the {side}'s own, got {type(wrong).__name__} for"
    with pytest.raises(ValueError, match=message):
        make(processors | {side: wrong})
    make(processors)


def test_a_teachers_tokenizer_that_cannot_be_read_is_refused_for_one_tokenizer_too(tmp_path):
    with pytest.raises(ValueError, match="teacher_tokenizer_name_or_path must be a folder or hub"):
        make_trainer(
            tmp_path,
            tiny_rows(4),
            "qwen3",
            teacher_tokenizer_name_or_path=str(tmp_path / "none"),
        )


def test_a_revision_of_a_teacher_that_is_loaded_is_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher_model_revision must be None for a teacher that"):
        make_trainer(tmp_path, tiny_rows(4), "qwen3", teacher_model_revision="v1")

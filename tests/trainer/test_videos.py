"""Videos reach models whose processors take them as in inference; others refuse them by name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from gold_trainer.data import videos
from gold_trainer.data.dataset import RowDataset
from gold_trainer.rendering.collator import GOLDCollator
from gold_trainer.rendering.prompts import process_examples
from support.cross_cases import (
    assert_step_is_eager,
    cross_trainer,
    make_sides,
)
from support.eager_step import completion_of, eager_step, prompt_inputs
from support.tiny_models import TEXT_FAMILIES, VLM_FAMILIES, tiny, tiny_picture, tiny_processor
from support.trainer_cases import assert_equal_gradients, make_trainer, one_step

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
QUESTION = {"role": "user", "content": "What is this?"}
ANSWER = {"role": "assistant", "content": "A red bar."}
CHAT = {"messages": [QUESTION, ANSWER]}


def frames_of(count=6, height=24, width=32, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3))
    return levels.astype(np.uint8)


def read(columns, takes_videos=True, is_text=False, **options):
    options |= {"needs_completion": True, "is_text": is_text, "takes_videos": takes_videos}
    return list(RowDataset([CHAT | columns], **options))


def collator_of(family):
    processor = tiny_processor(family)
    return GOLDCollator(processor, [processor.tokenizer.eos_token_id], None)


ROWS = [
    CHAT | {"videos": [frames_of(4)]},
    CHAT | {"videos": [frames_of(6, 40, 24, 1), frames_of(5, 24, 24, 2)]},
    CHAT | {"videos": [frames_of(8, seed=3)], "images": [tiny_picture(1)]},
    CHAT | {"images": [tiny_picture(2)]},
    CHAT,
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [2, 5, 60])
def test_tokens_and_pixels_are_those_of_inference(family, count):
    collator = collator_of(family)
    row = {"videos": [frames_of(count), frames_of(count, 40, 24)], "images": [tiny_picture(1)]}
    example = collator.example(read(row)[0])
    expected = prompt_inputs(collator.processor, CHAT | row)
    actual = process_examples(collator.processor, [example])
    assert example.prompt_length == expected["input_ids"].shape[1]
    assert actual.keys() == expected.keys() and "pixel_values_videos" in actual
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_per_second_are_those_of_the_video(family):
    collator = collator_of(family)
    video = frames_of(24)
    row = read({"videos": [{"video": video, "fps": 8}]})[0]
    metadata = {"total_num_frames": 24, "fps": 8.0, "frames_indices": list(range(24))}
    content = [{"type": "video", "video": video}, {"type": "text", "text": QUESTION["content"]}]
    expected = collator.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": [metadata]},
    )
    actual = process_examples(collator.processor, [collator.example(row)])
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_the_eager_one(family, tmp_path):
    student, processor = tiny(family)
    teacher, _ = tiny(family, "teacher")
    completions = [completion_of(family, processor, row) for row in ROWS]
    sizes = {model.get_output_embeddings().out_features for model in (student, teacher)}
    vocab_size = len(processor.tokenizer) if len(sizes) > 1 else None
    loss, gradients = eager_step(
        student, teacher, processor, ROWS, completions, vocab_size=vocab_size
    )
    options = {"student": student, "teacher": teacher, "processor": processor}
    actual, actual_gradients = one_step(
        tmp_path, ROWS, family, **options, per_device_train_batch_size=5, max_length=None
    )
    assert abs(actual - loss) <= 1e-5 * loss
    expected = {name: gradient.float() for name, gradient in gradients.items()}
    assert_equal_gradients(actual_gradients, expected, relative=1e-4)


def test_a_step_across_families_equals_the_eager_one(tmp_path):
    sides = make_sides("qwen3_vl", "qwen2_5_vl")
    fields = {"max_length": None, "uld_token_merge_strategy": "bayesian"}
    assert_step_is_eager(tmp_path, sides, ROWS[:3], **fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_student_writes_is_what_generate_writes(family, tmp_path):
    model, processor = tiny(family)
    trainer = make_trainer(
        tmp_path,
        ROWS[:3],
        family,
        student=model,
        processor=processor,
        lmbda=1.0,
        top_k=1,
        num_generations=2,
        per_device_train_batch_size=6,
        max_length=None,
    )
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
    for example in batches[0].examples:
        inputs = prompt_inputs(processor, ROWS[example.index])
        output = model.eval().generate(**inputs, do_sample=False, max_new_tokens=8)
        written = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert example.written_ids == written[: len(example.written_ids)] != []
    first, second = batches[0].examples[:2]
    assert first.videos[0] is second.videos[0], "a row that comes again shares them"


def ways_in(video, tmp_path):
    pictures = [Image.fromarray(frame) for frame in video]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(len(pictures))]
    return {
        "array": video,
        "channels first": np.ascontiguousarray(video.transpose(0, 3, 1, 2)),
        "tensor": torch.from_numpy(video),
        "floats": video.astype(np.float32) / 255,
        "pictures": pictures,
        "paths": paths,
        "bytes of pictures": [{"bytes": (tmp_path / f"{i}.png").read_bytes()} for i in range(6)],
        "dict": {"frames": pictures, "fps": 2},
    }


def test_every_way_in_gives_the_same_frames(tmp_path):
    video = frames_of()
    for name, value in ways_in(video, tmp_path).items():
        part = {"type": "video", "video": value}
        text = {"type": "text", "text": "What?"}
        in_message = {"messages": [{"role": "user", "content": [part, text]}, ANSWER]}
        placed = {"messages": [{"role": "user", "content": "<video>What?"}, ANSWER]}
        for columns in ({"video": value}, {"videos": [value]}, in_message):
            (row,) = read(columns)
            assert np.array_equal(row.videos[0].frames, video), name
            assert row.videos[0].fps == (2 if name == "dict" else None)
            assert row.prompt[0]["content"][0] == {"type": "video"}
        (row,) = read(placed | {"videos": [value]})
        assert row.prompt[0]["content"] == [{"type": "video"}, text]


def test_paths_of_frames_may_be_json_text_in_a_column(tmp_path):
    video = frames_of()
    paths = ways_in(video, tmp_path)["paths"]
    messages = {"messages": [{"role": "user", "content": "What?"}, ANSWER]}
    for columns in ({"video": json.dumps(paths)}, {"videos": json.dumps([paths])}):
        (row,) = read(messages | columns)
        assert np.array_equal(row.videos[0].frames, video)


def test_a_turn_has_the_videos_before_it():
    asked = {"role": "user", "content": "<video>What?"}
    columns = {"messages": [asked, ANSWER, asked, ANSWER], "videos": [frames_of(4), frames_of(5)]}
    rows = read(columns, train_on="all")
    assert [[len(video.frames) for video in row.videos] for row in rows] == [[4], [4, 5]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"video": 3}, "video must be a video: a list of pictures, an array .* got int; convert"),
        ({"videos": [tiny_picture(0)]}, r"videos\[0\] must be a video: .* got Image"),
        ({"videos": [[]]}, r"videos\[0\] must be a video: a list of pictures, .* got list"),
        ({"video": {"fps": 2, "frames": None}}, "video must be a video: .* got dict"),
        ({"video": {"bytes": b"mp4", "path": None}}, "video must be frames or the path of a file"),
        ({"video": "https://example.com/a.mp4"}, "video must be a file, got the address 'https:"),
        ({"video": "missing.mp4"}, "video must be the path of a video, got 'missing.mp4', and"),
        ({"video": {"frames": [tiny_picture(0)], "fps": 0}}, "video must have a positive number"),
        ({"video": [tiny_picture(0), tiny_picture(1)]}, r"video must have frames of one size, got"),
        ({"video": ["a.png"]}, "video, frame 0 must be the path of a picture, got 'a.png'"),
        ({"video": np.zeros((4, 8, 8), np.uint8)}, r"video must be an array of frames, \(T, H, W"),
        ({"video": np.zeros((4, 8, 8, 3))[:0]}, "video must be an array of frames"),
        ({"video": np.full((4, 8, 8, 3), 300)}, r"video must hold levels of 8 bits .* got int64"),
        ({"video": frames_of(), "videos": [frames_of()]}, "videos must be in one column, got vid"),
        (
            {"messages": [{"role": "user", "content": "<video> <video>"}, ANSWER], "video": "a"},
            "the prompt has <video> 2 times but the row has 1 videos",
        ),
    ],
)
def test_what_is_no_video_names_row_and_key(columns, message):
    with pytest.raises(ValueError, match=f"^row 0: {message}"):
        read(columns)


@pytest.mark.parametrize("kind", ["audio", "input_audio", "file"])
def test_sound_and_other_parts_are_refused_by_name(kind):
    content = [{"type": kind, kind: "a.wav"}, {"type": "text", "text": "What?"}]
    with pytest.raises(
        ValueError, match=f"^row 0: a part of a message must be .*{kind}.*takes sound"
    ):
        read({"messages": [{"role": "user", "content": content}, ANSWER]})
    with pytest.raises(ValueError, match=r"columns must be among .* got audio, which nothing uses"):
        read({"audio": "a.wav"})


def test_a_file_is_decoded_where_the_processor_says_which_frames(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"a film")
    monkeypatch.setattr(videos, "decoder", lambda: None)
    with pytest.raises(ValueError, match=r"^row 0: video needs a package .* pip install torchcod"):
        read({"video": str(path)})
    film = frames_of(48)

    def load(name, backend, sample_indices_fn):
        assert (name, backend) == (str(path), "pyav")
        metadata = videos.VideoMetadata(48, 12.0, frames_indices=list(range(48)))
        if sample_indices_fn is not None:
            metadata.frames_indices = sample_indices_fn(metadata=metadata)
        return film[metadata.frames_indices], metadata

    monkeypatch.setattr(videos, "decoder", lambda: "pyav")
    monkeypatch.setattr(videos, "load_video", load)
    for family in FAMILIES:
        collator = collator_of(family)
        lengths = [
            collator.example(read({"video": value})[0]).prompt_length
            for value in (str(path), {"video": film, "fps": 12.0})
        ]
        assert lengths[0] == lengths[1]


@pytest.mark.parametrize("family", sorted({*VLM_FAMILIES, *TEXT_FAMILIES} - {*FAMILIES}))
def test_videos_are_refused_where_the_processor_takes_none(family, tmp_path):
    assert not videos.takes_videos(tiny_processor(family))
    with pytest.raises(ValueError, match=r"^row 0: this student takes no videos, got 1; drop"):
        make_trainer(tmp_path, [CHAT | {"videos": [frames_of()]}], family)
    text = {"messages": [{"role": "user", "content": "What does <video> do?"}, ANSWER]}
    assert read(text, takes_videos=False)[0].prompt == text["messages"][:1], "it is text"


def test_videos_are_refused_where_the_teachers_processor_takes_none(tmp_path):
    student, teacher = make_sides("qwen3_vl", "lfm2_vl")
    trainer, _ = cross_trainer(tmp_path, ROWS[:2], student, teacher, max_length=None)
    message = "on the teacher's side, row 0: Lfm2VlProcessor takes no videos here, got 1; drop the"
    with pytest.raises(ValueError, match=message):
        trainer.train()

"""A row's key in a teacher cache: what changes it, and which part of it."""

import os

import numpy as np
import pytest
from PIL import Image

from gold_trainer.batches import Example
from gold_trainer.caching.keys import Key, key_of
from gold_trainer.data.videos import Video

FRAMES = np.zeros((2, 4, 4, 3), np.uint8)
BASE = Example(0, "What?", 3, [Image.new("RGB", (4, 6))], [1, 2], adds_special_tokens=False)


def changed(**fields):
    """Parts of the key that are others."""
    keys = key_of(BASE), key_of(Example(**{**vars(BASE), **fields}))
    return [name for name, *parts in zip(Key._fields, *keys, strict=True) if parts[0] != parts[1]]


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("prompt", {"prompt_text": "Why?"}),
        ("prompt", {"prompt_length": 4}),
        ("prompt", {"adds_special_tokens": True}),
        ("prompt", {"is_cut": True}),
        ("completion", {"completion_ids": [1, 3]}),
        ("media", {"images": [Image.new("RGB", (6, 4))]}),
        ("media", {"images": [Image.new("L", (4, 6))]}),
        ("media", {"images": BASE.images * 2}),
        ("media", {"videos": [Video(FRAMES)]}),
    ],
)
def test_what_the_teacher_sees_changes_its_part_of_the_key(part, fields):
    assert changed(**fields) == [part]


def test_a_rows_place_and_how_its_completion_was_sampled_are_not_in_the_key():
    assert changed(index=5, turn=1, logprobs=[0.0, -1.0], teacher_id="a") == []


def test_frames_and_their_rate_are_in_the_key():
    videos = [Video(FRAMES), Video(FRAMES, fps=2.0), Video(FRAMES + 1), Video(FRAMES[:1])]
    keys = {key_of(Example(**{**vars(BASE), "videos": [video]})).media for video in videos}
    assert len(keys) == 4


@pytest.mark.parametrize("place", [0, 5 * 3072, -1])
def test_the_file_of_a_video_is_in_the_key_by_its_bytes_and_not_by_its_name(place, tmp_path):
    """Of a large one parts all over it are read."""
    data = bytearray(np.random.default_rng(0).bytes(1024 * 3072))
    keys = []
    for number, name in enumerate(("a.mp4", "b.mp4", "a.mp4")):
        if number == 2:
            data[place] ^= 1
        path = tmp_path / name
        path.write_bytes(data)
        os.utime(path, ns=(number, number))
        keys.append(key_of(Example(**{**vars(BASE), "videos": [Video(None, str(path))]})).media)
    assert keys[0] == keys[1] != keys[2]

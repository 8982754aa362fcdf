"""A row's key in a teacher cache: a hash of all that the teacher sees of it.

The cache is found by content, not by place: shuffling, workers, ranks, a part of the dataset or
another order of its rows change nothing. Row and turn are kept for messages.
"""

import hashlib
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gold_trainer.batches import Example
from gold_trainer.data.videos import Video

KEY_BYTES = 16
NUM_PROBES = 1024  # parts that are read of a large file
PROBE_BYTES = 1024


class Key(NamedTuple):
    """Hashes of the parts of an example, to say which one has changed."""

    prompt: bytes
    completion: bytes
    media: bytes

    @property
    def whole(self) -> bytes:
        return digest(self, KEY_BYTES)


def digest(parts: Iterable[bytes], size: int = KEY_BYTES) -> bytes:
    """A hash of the parts and of where one ends."""
    hasher = hashlib.blake2b(digest_size=size)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


def key_of(example: Example) -> Key:
    prompt = f"{example.prompt_length} {example.adds_special_tokens} {example.is_cut}"
    ids = np.asarray(example.written_ids, dtype=np.int64)
    media = [part for image in example.images for part in _of_image(image)]
    media += [part for video in example.videos for part in _of_video(video)]
    return Key(
        digest([prompt.encode(), example.prompt_text.encode()]),
        digest([ids.tobytes()]),
        digest(media),
    )


def _of_image(image: Image.Image) -> tuple[bytes, bytes]:
    return f"{image.mode} {image.size}".encode(), image.tobytes()


def _of_video(video: Video) -> list[bytes]:
    parts = [f"video {video.fps}".encode()]
    if video.frames is not None:
        parts += [str(video.frames.shape).encode(), np.ascontiguousarray(video.frames).tobytes()]
    if video.path is not None:
        state = os.stat(video.path)
        parts.append(_probed(video.path, state.st_size, state.st_mtime_ns))
    return parts


@lru_cache(maxsize=4096)
def _probed(path: str, size: int, _changed: int) -> bytes:
    """A hash of a file's size and of parts all over it; of a small one, of all of it."""
    step = max(PROBE_BYTES, size // NUM_PROBES)
    probes = [str(size).encode()]
    with open(path, "rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            probes.append(file.read(PROBE_BYTES))
        file.seek(max(0, size - PROBE_BYTES))
        probes.append(file.read(PROBE_BYTES))
    return digest(probes)


def file_digest(path: Path) -> str:
    """A hash of parts of a file that may be large: weights that were trained on differ all over."""
    state = path.stat()
    return _probed(str(path), state.st_size, state.st_mtime_ns).hex()


def text_digest(value: Any) -> str:
    return digest([str(value).encode()]).hex()

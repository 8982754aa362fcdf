"""One way in for videos: whatever holds one -> frames, sampled as the processor samples them.

A video is a list of pictures, an array of frames, the path of a file, or a dict with one of these
and its frames per second. T frames of height H and width W.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.video_utils import VideoMetadata, load_video

from gold_trainer.data.pictures import PictureReader, levels_of
from gold_trainer.data.row_errors import PictureError

FRAME_KEYS = ("video", "frames", "video_url", "url", "path")  # of a part or a dict
DECODERS = {"torchcodec": "torchcodec", "pyav": "av", "decord": "decord", "opencv": "cv2"}
# Arguments of a video processor that are no business of its choice of frames.
NOT_OF_SAMPLING = ("do_sample_frames", "video_metadata", "device", "input_data_format")


@dataclass(frozen=True, eq=False)
class Video:
    """Frames, or the file that holds them: it is decoded where it is known which are needed."""

    frames: np.ndarray | None  # (T, H, W, 3) uint8
    path: str | None = None
    fps: float | None = None  # of the frames; None: unknown

    def sampled(self, processor: ProcessorMixin) -> tuple[np.ndarray, VideoMetadata]:
        """The frames that a processor takes of it where nobody tells it which."""
        own: Any = getattr(processor, "video_processor")  # noqa: B009  # not of every processor
        names = set(own.valid_kwargs.__annotations__).difference(NOT_OF_SAMPLING)
        options = {name: getattr(own, name, None) for name in names}
        choose = partial(own.sample_frames, **options) if own.do_sample_frames else None
        if self.frames is None:
            load: Any = load_video  # typed for arrays, which it hands back
            return load(self.path, backend=decoder(), sample_indices_fn=choose)
        total, height, width, _ = self.frames.shape
        metadata = VideoMetadata(total, self.fps, width, height, frames_indices=list(range(total)))
        if choose is None:
            return self.frames, metadata
        metadata.frames_indices = choose(metadata=metadata)
        return self.frames[metadata.frames_indices], metadata


@dataclass(frozen=True)
class VideoReader:
    """Reads videos of rows; ValueError names the row, the key and the remedy."""

    pictures: PictureReader

    def read(self, value: Any, index: int, key: str) -> Video:
        where, fps = f"row {index}: {key}", None
        while isinstance(value, Mapping):
            if value.get("fps") is not None:
                fps = _checked_fps(value["fps"], where)
            name = next((name for name in FRAME_KEYS if value.get(name) is not None), None)
            if name is None and value.get("bytes") is not None:
                raise PictureError(
                    f"{where} must be frames or the path of a file, got the file's bytes; write "
                    "them to a file."
                )
            if name is None:
                raise _no_video(value, where)
            value = value[name]
        if isinstance(value, str | os.PathLike):
            path = self.pictures.path(os.fsdecode(value), where, "a video")
            if decoder() is None:
                raise PictureError(
                    f"{where} needs a package that decodes videos, none of "
                    f"{', '.join(DECODERS)} is installed; pip install torchcodec, or give the "
                    "frames as a list of pictures."
                )
            return Video(None, str(path), fps)
        if isinstance(value, np.ndarray | torch.Tensor):
            return Video(_frames_of_array(levels_of(value, where), where), None, fps)
        if not isinstance(value, list | tuple) or not value:
            raise _no_video(value, where)
        frames = [
            np.asarray(self.pictures.read(frame, index, f"{key}, frame {i}"))
            for i, frame in enumerate(value)
        ]
        sizes = {frame.shape[1::-1] for frame in frames}
        if len(sizes) > 1:
            raise PictureError(
                f"{where} must have frames of one size, got {sorted(sizes)}; resize them."
            )
        return Video(np.stack(frames), None, fps)


def takes_videos(processor: Any) -> bool:
    """Whether videos reach the model as in inference. A processor with its own
    apply_chat_template (SmolVLM's) samples them there, and writes another template.
    """
    return (
        isinstance(processor, ProcessorMixin)
        and getattr(processor, "video_processor", None) is not None
        and getattr(processor, "video_token", None) is not None
        and type(processor).apply_chat_template is ProcessorMixin.apply_chat_template
    )


def processor_videos(
    processor: Any, videos: Sequence[Sequence[Video]], *, is_for_length: bool = False
) -> dict[str, Any]:
    """Arguments of a processor's call; for the length alone frames have no pixels."""
    if not any(videos):
        return {}
    sampled = [video.sampled(processor) for row in videos for video in row]
    frames: list[Any] = [array for array, _ in sampled]
    if is_for_length:
        frames = [
            torch.empty(len(a), 3, *a.shape[1:3], dtype=torch.uint8, device="meta") for a in frames
        ]
    return {
        "videos": frames,
        "video_metadata": [metadata for _, metadata in sampled],
        "do_sample_frames": False,
    }


def refuse_videos(
    processor: ProcessorMixin | PreTrainedTokenizerBase, num_videos: int, where: str
) -> None:
    if num_videos and not takes_videos(processor):
        raise ValueError(
            f"{where}: {type(processor).__name__} takes no videos here, got {num_videos}; drop the "
            "videos, or give some of their frames as pictures."
        )


def describe_videos(videos: Sequence[Video]) -> str:
    """Videos in the error of a processor that refuses them."""
    if not videos:
        return ""
    kinds = [v.path if v.frames is None else v.frames.shape[:3] for v in videos]
    return f" and {len(videos)} videos of {kinds}"


def decoder() -> str | None:
    """The backend of transformers' load_video that is installed."""
    found = (name for name, package in DECODERS.items() if importlib.util.find_spec(package))
    return next(found, None)


def _checked_fps(fps: Any, where: str) -> float:
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6:
        raise PictureError(
            f"{where} must have a positive number of frames per second, got fps={fps!a}; mend it, "
            "or leave it out."
        )
    return float(fps)


def _frames_of_array(frames: np.ndarray, where: str) -> np.ndarray:
    """(T, H, W, 3) or (T, 3, H, W), levels of 8 bits or floats in [0, 1] -> (T, H, W, 3) uint8."""
    if frames.ndim == 4 and frames.shape[-1] != 3 and frames.shape[1] == 3:
        frames = frames.transpose(0, 2, 3, 1)
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise PictureError(
            f"{where} must be an array of frames, (T, H, W, 3) or (T, 3, H, W), got "
            f"{frames.shape}; convert it."
        )
    if frames.dtype != np.uint8:
        raise PictureError(
            f"{where} must hold levels of 8 bits (uint8) or floats in [0, 1], got {frames.dtype}; "
            "convert it."
        )
    return np.ascontiguousarray(frames)


def _no_video(value: Any, where: str) -> PictureError:
    return PictureError(
        f"{where} must be a video: a list of pictures, an array of frames, the path of a file, or "
        f"a dict with one of these as video, got {type(value).__name__}; convert the column."
    )

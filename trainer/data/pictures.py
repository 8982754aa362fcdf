"""One way in for pictures: whatever holds one -> an upright picture in RGB.

A picture is a PIL image, an array, a path, the bytes of a file, base64 text, or a dict with one of
these as datasets and chat messages have it. Size and path are checked before anything is decoded.
Nothing is ever fetched: an address is an error.
"""

import base64
import binascii
import io
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from gold_trainer.data.row_errors import PictureError, told

MAX_PIXELS = 8192 * 8192  # 192 MiB once decoded
MAX_RATIO = 200  # of the sides; what Qwen's processors take
ORIENTATION = 0x0112  # a tag of EXIF: phones write pictures turned, with a note
# Of a part or a dict; source and data are those of Anthropic's requests.
PLACE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes", "source", "data")
# What base64 of a PNG, JPEG, GIF, WebP, TIFF, BMP and AVIF file starts with; _9j_ in addresses.
BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkqA", "TU0AK", "Qk", "AAAA", "_9j_")
DRAWINGS = ("EPS", "WMF", "EMF")  # other programs draw them


@dataclass(frozen=True)
class PictureReader:
    """Reads pictures of rows; ValueError names the row, the key and the remedy."""

    folder: Path | None = None  # that relative paths start from; None: the current one
    max_pixels: int | None = MAX_PIXELS
    is_confined: bool = False  # to the folder, links followed

    def read(self, value: Any, index: int, key: str) -> Image.Image:
        """The picture that a row holds under this key."""
        where = f"row {index}: {key}"
        picture = self._open(value, index, where)
        self._check_size(picture, where)
        try:
            picture.load()  # PIL reads lazily: a broken file shows here, where the row is known
            if picture.getexif().get(ORIENTATION, 1) != 1:
                picture = ImageOps.exif_transpose(picture)
            return as_rgb(picture)
        except Exception as error:  # PIL's plugins raise whatever a broken file leads them to
            raise unreadable(index, key, error) from error

    def _open(self, value: Any, index: int, where: str) -> Image.Image:
        """A picture whose pixels are not read yet."""
        key = where.partition(": ")[2]
        if isinstance(value, Image.Image):
            return value
        if is_of_numbers(value):  # as tables have arrays
            value = array_of_lists(value, where)
        if isinstance(value, np.ndarray | torch.Tensor):
            return picture_of_array(value, where)
        source = self._source(value, where)
        if not isinstance(source, Path) and not source:
            raise unreadable(index, key, ValueError("it has no bytes"))
        try:
            picture = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
        except UnidentifiedImageError as error:
            name = f": {str(source)!a}" if isinstance(source, Path) else ""
            reason = ValueError(f"it is in no format that PIL knows{name}")
            raise unreadable(index, key, reason) from error
        except Exception as error:
            raise unreadable(index, key, error) from error
        if picture.format in DRAWINGS:
            raise unreadable(index, key, ValueError(f"a drawing in the format {picture.format}"))
        return picture

    def _source(self, value: Any, where: str) -> Path | bytes:
        """The path or the bytes of a picture's file."""
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if isinstance(value, os.PathLike):
            return self.path(os.fsdecode(value), where)
        if isinstance(value, str):
            return self._source_of_text(value, where)
        if isinstance(value, Mapping):
            if value.get("bytes") is not None:  # the path beside them is a name only
                return self._source(value["bytes"], where)
            if isinstance(value.get("base64"), str | bytes):
                return _decoded(value["base64"], where)
            for key in PLACE_KEYS:
                if value.get(key) is not None:
                    return self._source(value[key], where)
        raise PictureError(
            f"{where} must be a picture: a PIL image, a path, the bytes of a file, base64 text, or "
            f"a dict with bytes or path, got {type(value).__name__}; convert the column."
        )

    def _source_of_text(self, text: str, where: str) -> Path | bytes:
        if text[:5].lower() == "data:":
            head, _, data = text.partition(",")
            if not head.lower().endswith(";base64"):
                raise PictureError(
                    f"{where} must be base64 in a data address, got {head[:40]!a}; write "
                    "data:image/png;base64,..."
                )
            return _decoded(data, where)
        if len(text) > 60 and text.lstrip().startswith(BASE64_STARTS):
            try:
                return _from_base64(text)
            except binascii.Error:
                pass  # a path that only starts alike
        return self.path(text, where)

    def path(self, text: str, where: str, what: str = "a picture") -> Path:
        """The path of a file that is there, in the folder if paths are confined to it."""
        if "://" in text:
            raise PictureError(
                f"{where} must be a file, got the address {text[:80]!a}; nothing is fetched: "
                "download the files first, and leave file:// out of a path."
            )
        folder = self.folder or Path()
        path = folder / text
        try:
            is_file = path.is_file()  # no folder, and no pipe that would wait for a writer
            if not is_file:
                found = (folder / form for form in _other_forms(text))
                path = next((other for other in found if other.is_file()), path)
                is_file = path.is_file()
        except (OSError, ValueError) as error:  # too long; a NUL or a lone surrogate
            raise PictureError(
                f"{where} must be the path of {what}, got {text[:80]!a} ({told(error)}); mend or "
                "drop the row."
            ) from error
        if "\0" in text or not is_file:
            raise PictureError(
                f"{where} must be the path of {what}, got {text[:200]!a}, and there is no file "
                f"{str(path)[:300]!a}; paths start from {str(folder.absolute())!a}."
            )
        if self.is_confined and not path.resolve().is_relative_to(folder.resolve()):
            raise PictureError(
                f"{where} must lie in {str(folder)!a}, got {text[:200]!a}; copy the file into "
                "that folder, or choose another picture_folder."
            )
        return path

    def _check_size(self, picture: Image.Image, where: str) -> None:
        width, height = picture.size
        if min(width, height) < 1 or max(width, height) > MAX_RATIO * min(width, height):
            raise PictureError(
                f"{where} must have sides of at least 1 pixel and at most {MAX_RATIO} to 1, got "
                f"{width} x {height}; cut it or drop the row."
            )
        if self.max_pixels is not None and width * height > self.max_pixels:
            raise PictureError(
                f"{where} must have at most max_pixels={self.max_pixels} pixels, got {width} x "
                f"{height} = {width * height}; make it smaller, or raise max_pixels."
            )


def unreadable(index: int, key: str, error: Exception) -> PictureError:
    return PictureError(
        f"row {index}: its picture cannot be read ({key}: {told(error)}); mend or drop the row."
    )


def _from_base64(text: str | bytes) -> bytes:
    """Decode either alphabet, with padding or without."""
    text = text.decode("ascii") if isinstance(text, bytes) else text
    data = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    return base64.b64decode(data + "=" * (-len(data) % 4), validate=True)


def _decoded(text: str | bytes, where: str) -> bytes:
    try:
        return _from_base64(text)
    except ValueError as error:  # binascii's, and of characters that are no ASCII
        raise PictureError(
            f"{where} must be base64, got {text[:40]!a} ({told(error)}); encode the file again."
        ) from error


def _other_forms(text: str) -> list[str]:
    """A path as other systems write it: of macOS, which takes letters and accents apart, of
    Windows.
    """
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    return [form for form in (*forms, text.replace("\\", "/")) if form != text]


def is_of_numbers(value: Any) -> bool:
    """Whether lists in lists are an array."""
    depth = 0
    while isinstance(value, list | tuple) and value:
        value, depth = value[0], depth + 1
    return depth > 1 and isinstance(value, int | float)


def array_of_lists(value: Any, where: str) -> np.ndarray:
    try:
        levels = np.asarray(value)
    except ValueError as error:
        raise PictureError(
            f"{where} must be lists of numbers of one length, got others ({told(error)}); mend or "
            "drop the row."
        ) from error
    if np.issubdtype(levels.dtype, np.integer) and levels.min() >= 0 and levels.max() < 2**16:
        return levels.astype(np.uint8 if levels.max() < 256 else np.uint16)
    return levels


def levels_of(value: Any, where: str) -> np.ndarray:
    """An array or a tensor as an array; bits, and floats in [0, 1], as levels of 8 bits."""
    if isinstance(value, torch.Tensor):
        try:
            value = value.float() if value.dtype == torch.bfloat16 else value
            value = value.numpy(force=True)
        except (TypeError, RuntimeError) as error:  # sparse, without data, of odd numbers
            raise PictureError(
                f"{where} must be a tensor with numbers that numpy has, got {value.dtype} on "
                f"{value.device} ({told(error)}); convert the column."
            ) from error
    is_float = np.issubdtype(value.dtype, np.floating)
    if value.size and is_float and value.min() >= 0 and value.max() <= 1:
        return np.round(value * 255).astype(np.uint8)
    return value.astype(np.uint8) * 255 if value.dtype == bool else value


def picture_of_array(value: Any, where: str) -> Image.Image:
    """(H, W), or (H, W, C) or (C, H, W) with C of 1, 3 or 4: levels of 8 bits or floats in [0, 1];
    without C also of 16 bits.
    """
    levels = levels_of(value, where)
    channels = (1, 3, 4)
    if levels.ndim == 3 and levels.shape[-1] not in channels and levels.shape[0] in channels:
        levels = levels.transpose(1, 2, 0)
    if levels.ndim == 3 and levels.shape[-1] == 1:
        levels = levels[..., 0]
    is_deep = levels.ndim == 2 and levels.dtype == np.uint16
    has_shape = levels.ndim == 2 or (levels.ndim == 3 and levels.shape[-1] in channels)
    if not has_shape or not levels.size or not (levels.dtype == np.uint8 or is_deep):
        raise PictureError(
            f"{where} must be an array (H, W), (H, W, C) or (C, H, W) of 8 bits (uint8) or of "
            f"floats in [0, 1], got {levels.dtype} {levels.shape}; convert the column."
        )
    return Image.fromarray(np.ascontiguousarray(levels))


def as_rgb(picture: Image.Image) -> Image.Image:
    """Not every processor takes grey, palette or transparent pictures."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        picture = _eight_bits(picture)
    if picture.mode == "La":  # its alpha would get lost on the way to RGBA
        picture = picture.convert("LA")
    if picture.has_transparency_data:  # on white: what is see-through is mostly stored as black
        colour = picture.info.get("transparency")
        if picture.mode == "RGB" and isinstance(colour, tuple) and max(colour) > 255:
            picture = picture.copy()  # a file of 16 bits, of which PIL keeps the upper 8
            picture.info["transparency"] = tuple(level >> 8 for level in colour)
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Levels of 16 bits or floats as 8 bits: convert() would clip them at 255."""
    levels = np.asarray(picture)
    low, high = levels.min(), levels.max()
    if picture.mode == "F":
        if not (low >= 0 and (high <= 1 or 16 <= high <= 255)):  # between them it is either
            raise ValueError(
                f"floats must lie in [0, 1] or [0, 255], got {low:g} to {high:g}: convert it to 8 "
                "bits"
            )
        levels = np.round(levels * (255 if high <= 1 else 1))
    else:
        if low < 0 or high > 65535:
            raise ValueError(f"levels must lie in [0, 65535], got {low:g} to {high:g}")
        # PIL's mode I holds 32 bits: with levels of 8 where a grey picture was converted
        is_deep = picture.mode != "I" or picture.format == "PNG" or high > 255
        see_through = levels == picture.info.get("transparency")
        levels = np.where(see_through, 255, levels >> 8 if is_deep else levels)
    return Image.fromarray(levels.astype(np.uint8))

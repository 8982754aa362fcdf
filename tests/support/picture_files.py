"""Bytes of a picture's file."""

import io
from typing import Any

from PIL import Image


def file_of(picture: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    picture.save(data, format=file_format, **options)
    return data.getvalue()

"""Pictures as arrays, in every orientation and mode, animated, broken, and as base64 text."""

import base64
import json
import struct

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from gold_trainer.data.dataset import RowDataset
from support.picture_files import file_of

CHAT = {
    "messages": [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "A bar."},
    ]
}


def read(value, column="image"):
    return RowDataset([CHAT | {column: value}], needs_completion=True, is_text=False)[0].images


COLOURS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


@pytest.mark.parametrize(
    "value",
    [
        COLOURS,
        COLOURS.transpose(2, 0, 1),
        COLOURS / 255,
        (COLOURS / 255).astype(np.float32),
        torch.from_numpy(COLOURS),
        torch.from_numpy(COLOURS).permute(2, 0, 1),
        torch.from_numpy(COLOURS).permute(2, 0, 1) / 255,
    ],
)
def test_an_array_of_colours_is_a_picture(value):
    (picture,) = read(value)
    assert np.array_equal(np.asarray(picture), COLOURS)


@pytest.mark.parametrize(
    ("value", "level"),
    [
        (np.full((4, 6), 77, np.uint8), 77),
        (np.full((4, 6, 1), 77, np.uint8), 77),
        (np.full((1, 4, 6), 77, np.uint8), 77),
        (np.full((4, 6), 77 * 256, np.uint16), 77),
        (np.full((4, 6), 0.5), 128),
        (np.ones((4, 6), bool), 255),
        (np.zeros((4, 6, 4), np.uint8), 255),  # transparent: on white
    ],
)
def test_an_array_without_colours_is_grey(value, level):
    (picture,) = read(value)
    assert (picture.size, picture.getpixel((3, 2))) == ((6, 4), (level,) * 3)


@pytest.mark.parametrize(
    "value",
    [
        np.full((4, 6, 3), 20),
        np.full((4, 6, 3), 20.0),
        np.zeros((1, 4, 6, 3), np.uint8),
        np.zeros((0, 6, 3), np.uint8),
        np.zeros((5, 6, 2), np.uint8),
        np.full((4, 6), np.nan),
        torch.full((3, 4, 6), -0.5),
    ],
)
def test_an_array_that_may_mean_anything_is_refused(value):
    with pytest.raises(ValueError, match=r"^row 0: image must be an array .* convert the column"):
        read(value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_upright_whichever_way_it_comes(orientation, tmp_path):
    upright = Image.new("RGB", (16, 24), "red")
    upright.paste("blue", (0, 0, 8, 8))
    turns = [
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    ]
    turn = turns[orientation - 1]
    note = Image.Exif()
    note[0x0112] = orientation
    data = file_of(upright if turn is None else upright.transpose(turn), exif=note)
    path = tmp_path / "0.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    part = {"type": "image", "image": str(path)}
    messages = [{"role": "user", "content": [part]}, CHAT["messages"][1]]
    table = datasets.Dataset.from_dict({"messages": [CHAT["messages"]], "image": [str(path)]})
    pictures = [
        *(read(value)[0] for value in (Image.open(path), path, data, text, {"bytes": data})),
        RowDataset([{"messages": messages}], needs_completion=True, is_text=False)[0].images[0],
        RowDataset(
            table.cast_column("image", datasets.Image()), needs_completion=True, is_text=False
        )[0].images[0],
    ]
    for picture in pictures:
        assert (picture.mode, picture.size) == ("RGB", (16, 24))
        assert picture.getpixel((1, 1)) == (0, 0, 255) and picture.getpixel((14, 1)) == (255, 0, 0)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"],
)
def test_every_mode_becomes_rgb(mode):
    (picture,) = read(Image.new(mode, (8, 6)))
    assert (picture.mode, picture.size) == ("RGB", (8, 6))


def test_a_palette_with_levels_of_transparency_lies_on_white():
    picture = Image.new("P", (8, 6))
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.putpixel((3, 3), 1)
    (rgb,) = read(file_of(picture, transparency=b"\x00\xff"))
    assert (rgb.getpixel((0, 0)), rgb.getpixel((3, 3))) == ((255,) * 3, (0, 255, 0))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_of_several_frames_is_taken(file_format):
    first, second = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = file_of(first, file_format, save_all=True, append_images=[second], **options)
    assert read(data)[0].getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_base64_text_may_have_lines(file_format):
    data = file_of(Image.new("RGB", (8, 6), "red"), file_format)
    for text in (base64.b64encode(data).decode(), base64.encodebytes(data).decode()):
        assert read(text)[0].size == (8, 6)


def test_a_list_of_paths_may_be_json_text(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.png", "[b].png")]
    for path in paths:
        Image.new("RGB", (8, 6)).save(path)
    assert len(read(json.dumps(paths), "images")) == 2
    assert len(read(paths[1])) == 1


def huge_tiff():
    """A header of a few bytes that says 60000 x 60000."""
    tags = [(256, 4, 60000), (257, 4, 60000), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 200)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 100


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it has no bytes"),
        ("data:image/png;base64,", "it has no bytes"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is in no format that PIL knows"),
        (b"%PDF-1.4\n", "it is in no format that PIL knows"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a drawing in the format EPS"),
        (file_of(Image.new("RGB", (300, 300), "red"), "JPEG")[:900], "image file is truncated"),
        (huge_tiff(), "Image size .3600000000 pixels. exceeds limit"),
    ],
)
def test_a_broken_file_names_row_key_and_reason(data, reason, tmp_path):
    ways = [data]
    if isinstance(data, bytes) and data:
        (tmp_path / "0.png").write_bytes(data)
        ways.append(str(tmp_path / "0.png"))
    for value in ways:
        with pytest.raises(
            ValueError, match=rf"^row 0: its picture cannot be read \(image: {reason}"
        ):
            read(value)


def test_an_empty_file_names_row_and_key(tmp_path):
    (tmp_path / "0.png").touch()
    with pytest.raises(ValueError, match=r"^row 0: .* cannot be read \(image: it is in no format"):
        read(str(tmp_path / "0.png"))

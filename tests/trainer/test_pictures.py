"""Every way in gives one upright picture in RGB; what is none is an error with row and key."""

import base64
import io
import os
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from gold_trainer.config import GOLDConfig
from gold_trainer.data.dataset import RowDataset
from gold_trainer.data.pictures import MAX_PIXELS, PictureReader
from gold_trainer.rendering.collator import GOLDCollator
from support.picture_files import file_of
from support.tiny_models import VLM_FAMILIES, tiny_picture, tiny_processor

CHAT = {
    "messages": [
        {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "A bar."},
    ]
}


def read(columns, index=0, **options):
    rows = [CHAT] * index + [CHAT | columns]
    return RowDataset(rows, needs_completion=True, is_text=False, **options)[index]


def turned():
    """Red above blue once upright, stored on its side."""
    upright = Image.new("RGB", (20, 40), "red")
    upright.paste("blue", (0, 20, 20, 40))
    note = Image.Exif()
    note[0x0112] = 6
    return file_of(upright.transpose(Image.Transpose.ROTATE_90), exif=note)


def ways_in(data, tmp_path):
    path = tmp_path / "0.png"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    return {
        "PIL": Image.open(io.BytesIO(data)),
        "path": str(path),
        "Path": path,
        "bytes": data,
        "dict of bytes": {"bytes": data, "path": "elsewhere.png"},
        "dict of path": {"bytes": None, "path": str(path)},
        "base64": text,
        "data address": f"data:image/png;base64,{text}",
        "dict of base64": {"base64": text},
    }


def test_a_picture_is_upright_whichever_way_it_comes(tmp_path):
    for name, value in ways_in(turned(), tmp_path).items():
        (picture,) = read({"image": value}).images
        assert (picture.mode, picture.size) == ("RGB", (20, 40)), name
        corners = picture.getpixel((0, 0)), picture.getpixel((0, 39))
        assert corners == ((255, 0, 0), (0, 0, 255)), name


def test_a_part_of_a_message_may_hold_its_picture(tmp_path):
    ways = ways_in(turned(), tmp_path)
    parts = [{"type": "image", "image": value} for value in ways.values()]
    parts.append({"type": "image", "path": ways["path"]})
    parts.append({"type": "image_url", "image_url": {"url": ways["data address"]}})
    text = {"type": "text", "text": "And this?"}
    messages = [{"role": "user", "content": [*parts, text]}, CHAT["messages"][1]]
    row = read({"messages": messages})
    assert [picture.size for picture in row.images] == [(20, 40)] * len(parts)
    assert row.prompt[0]["content"] == [{"type": "image"}] * len(parts) + [text]


def test_parts_with_and_without_a_picture_are_refused():
    content = [{"type": "image", "image": tiny_picture(0)}, {"type": "image"}]
    messages = [{"role": "user", "content": content}, CHAT["messages"][1]]
    with pytest.raises(ValueError, match=r"^row 1: image parts must all hold .* got 1 of 2; write"):
        read({"messages": messages}, index=1)


def test_a_table_of_bytes_or_of_structs_is_read_like_one_of_images(tmp_path):
    data = turned()
    for column in ([data], [{"bytes": data, "path": "0.png"}]):
        datasets.Dataset.from_dict(
            {"prompt": ["a"], "completion": ["b"], "image": column}
        ).to_parquet(tmp_path / "rows.parquet")
        table = datasets.Dataset.from_parquet(
            str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / str(type(column[0])))
        )
        rows = RowDataset(table, needs_completion=True, is_text=False)
        assert rows[0].images[0].size == (20, 40)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.25, 0.75)])
def test_floats_between_0_and_1_are_scaled(low, high):
    levels = np.array([[low, high]], dtype=np.float32)
    for value in (Image.fromarray(levels), levels, torch.tensor(levels).bfloat16()):
        (picture,) = read({"image": value}).images
        grey = [picture.getpixel((x, 0))[0] for x in (0, 1)]
        assert grey == [round(255 * low), round(255 * high)]


def test_floats_between_0_and_255_are_levels():
    levels = np.array([[0, 127.6, 255]], dtype=np.float32)
    (picture,) = read({"image": Image.fromarray(levels)}).images
    assert [picture.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("value", [-0.5, 1.5, 300.0, np.nan, np.inf])
def test_floats_that_may_mean_anything_are_refused(value):
    levels = np.array([[0, value]], dtype=np.float32)
    with pytest.raises(
        ValueError, match=r"^row 2: its picture cannot be read \(image: floats must"
    ):
        read({"image": Image.fromarray(levels)}, index=2)


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_sixteen_bits_keep_their_levels_in_every_mode(mode):
    levels = np.array([[0, 64 * 256, 255 * 256 + 9]], dtype=np.int32)
    picture = Image.fromarray(levels).convert(mode) if mode != "I" else Image.fromarray(levels)
    (rgb,) = read({"image": picture}).images
    assert [rgb.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (64,) * 3, (255,) * 3]


def test_thirty_two_bits_are_refused_and_eight_in_them_are_kept():
    (grey,) = read({"image": Image.new("L", (4, 4), 77).convert("I")}).images
    assert grey.getpixel((0, 0)) == (77,) * 3
    for level in (70000, -1):
        with pytest.raises(ValueError, match=r"\(image: levels must lie in \[0, 65535\]"):
            read({"image": Image.new("I", (4, 4), level)})


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_a_transparent_colour_lies_on_white(mode):
    picture = Image.new("RGB", (4, 4), (9, 9, 9))
    picture.putpixel((1, 1), (200, 0, 0))
    picture = picture.convert(mode)
    colour = (9, 9, 9) if mode == "RGB" else picture.getpixel((0, 0))
    data = file_of(picture, transparency=colour)
    (rgb,) = read({"image": data}).images
    assert rgb.getpixel((0, 0)) == (255,) * 3
    assert rgb.getpixel((1, 1)) != (255,) * 3


def test_a_transparent_level_of_sixteen_bits_lies_on_white():
    picture = Image.fromarray(np.array([[300, 64 * 256]], dtype=np.uint16))
    (rgb,) = read({"image": file_of(picture, transparency=300)}).images
    assert [rgb.getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (64,) * 3]


def claimed_png(width, height):
    """A PNG of a few bytes that says it is large: decoding it would take width * height."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_above_max_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda picture: pytest.fail("it was decoded"))
    data = claimed_png(13300, 13300)
    message = r"^row 1: image must have at most max_pixels=67108864 pixels, got 13300 x 13300 = "
    for name, value in ways_in(data, tmp_path).items():
        with pytest.raises(ValueError, match=message):
            read({"image": value}, index=1)
        assert name
    with pytest.raises(
        ValueError, match="max_pixels=99 pixels, got 10 x 10 = 100; make it smaller"
    ):
        read({"image": claimed_png(10, 10)}, max_pixels=99)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_picture_in_a_column_of_images_is_not_decoded_by_the_table(tmp_path):
    (tmp_path / "0.png").write_bytes(claimed_png(13300, 13300))
    columns = {"prompt": ["a"], "completion": ["b"], "images": [[str(tmp_path / "0.png")]]}
    table = datasets.Dataset.from_dict(columns)
    for feature in (datasets.List(datasets.Image()), datasets.LargeList(datasets.Image())):
        rows = table.cast_column("images", feature)
        with pytest.raises(ValueError, match=r"^row 0: images\[0\] must have at most max_pixels"):
            RowDataset(rows, needs_completion=True, is_text=False)[0]
        assert rows.features["images"].feature.decode, "the caller's table stays as it was"


def test_the_limit_of_the_config_is_that_of_the_reader():
    assert GOLDConfig(output_dir="runs/none").max_pixels == MAX_PIXELS


def test_no_limit_leaves_large_pictures_alone():
    reader = PictureReader(max_pixels=None)
    assert reader.read(Image.new("1", (8200, 8200)), 0, "image").size == (8200, 8200)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (12000, 16), (16, 12000)])
def test_a_picture_without_pixels_and_a_strip_are_refused(size):
    message = rf"^row 3: images\[1\] must have sides of .* got {size[0]} x {size[1]}; cut it or"
    with pytest.raises(ValueError, match=message):
        read({"images": [tiny_picture(0), Image.new("RGB", size)]}, index=3)


@pytest.mark.parametrize(
    "address",
    ["https://example.com/a.png", "file:///etc/passwd", "s3://bucket/a.png", "hf://datasets/a.png"],
)
def test_an_address_is_refused_before_anything_opens_it(address, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("it was opened"))
    message = "^row 2: {} must be a file, got the address .* nothing is fetched: download"
    for value in (address, {"bytes": None, "path": address}, {"url": address}):
        with pytest.raises(ValueError, match=message.format("image")):
            read({"image": value}, index=2)
    content = [{"type": "image_url", "image_url": {"url": address}}]
    messages = [{"role": "user", "content": content}, CHAT["messages"][1]]
    with pytest.raises(ValueError, match=message.format("message 0, part 0, image_url")):
        read({"messages": messages}, index=2)


def test_an_address_in_a_column_of_images_is_refused_before_anything_opens_it():
    columns = {"prompt": ["a"], "completion": ["b"], "image": ["https://example.com/a.png"]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match=r"^row 0: image must be a file, got the address"):
        RowDataset(table, needs_completion=True, is_text=False)[0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a\0.png", r"image must be the path of a picture, got 'a\\x00.png'"),
        ("\ud83d.png", r"image must be the path of a picture, got '\\ud83d.png'"),
        ("a" * 5000, "image must be the path of a picture, got 'aaa"),
        ("missing.png", "image must be the path of a picture, got 'missing.png', and there is no"),
        (b"not a picture", r"its picture cannot be read \(image: "),
        ("data:image/png;base64,???", r"image must be base64, got '\?\?\?'"),
        ("data:image/png,abc", "image must be base64 in a data address, got 'data:image/png'"),
        ({"base64": "\u00e9"}, r"image must be base64, got '\\xe9'"),
        ([""], r"images\[0\] must be the path of a picture, got ''"),
        ([None], r"images\[0\] must be a picture: .* got NoneType"),
        ({"size": 3}, "image must be a picture: a PIL image, a path, .* got dict; convert"),
        (3.5, "image must be a picture: a PIL image, a path, .* got float; convert"),
    ],
)
def test_what_is_no_picture_names_row_and_key(value, message):
    column = "images" if isinstance(value, list) else "image"
    with pytest.raises(ValueError, match=f"^row 1: {message}"):
        read({column: value}, index=1)


@pytest.mark.parametrize("value", [None, "", [], {}, {"bytes": None, "path": None}])
@pytest.mark.parametrize("column", ["image", "images"])
def test_a_row_among_pictures_may_have_none(value, column):
    row = read({column: value})
    assert row.images == [] and row.prompt == CHAT["messages"][:1]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(ValueError, match="there is no file"):
        read({"image": str(tmp_path / "0.png")})


def test_paths_stay_in_the_picture_folder(tmp_path):
    folder, outside = tmp_path / "data", tmp_path / "outside.png"
    folder.mkdir()
    tiny_picture(1).save(outside)
    tiny_picture(1).save(folder / "in.png")
    (folder / "link.png").symlink_to(outside)
    options = {"picture_folder": str(folder)}
    for path in ("in.png", "../data/in.png", str(folder / "in.png")):
        assert read({"image": path}, **options).images[0].size == tiny_picture(1).size
    for path in ("../outside.png", "link.png", str(outside), {"path": str(outside)}):
        assert read({"image": path if isinstance(path, dict) else str(folder / path)}).images
        with pytest.raises(ValueError, match=r"^row 4: image must lie in .* choose another"):
            read({"image": path}, index=4, **options)


@pytest.mark.parametrize("family", VLM_FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (16, 3200), (4000, 20)])
def test_an_odd_shape_becomes_tokens_or_an_error_that_names_the_row(family, size):
    processor = tiny_processor(family)
    collator = GOLDCollator(processor, [processor.tokenizer.eos_token_id], None)
    row = read({"image": Image.new("RGB", size)}, index=1)
    try:
        assert collator.example(row).prompt_length > 1
    except ValueError as error:
        assert str(error).startswith("row 1: the processor refuses the prompt")
        assert f"1 pictures of [{size}]" in str(error)

"""Pictures drawn here, each with a question and its one short answer.

    word     a made-up word of three letters, four fonts   Which word is written?
    number   two handwritten digits                        Which number is written by hand?
    count    shapes in four colours                        How many red circles are there?
    bars     a bar chart without values                    What is the value of B?

What is seen decides whether a picture is for training or held out: the word, the two handwritten
digits, where which shape lies, the heights of the bars. So no content of a held-out picture is ever
trained on, whatever the seed. Needs no torch: the process that draws starts no GPU.
"""

import multiprocessing
import random
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64  # pixels of a side
HELD_OUT_PART = 8  # one content in so many is held out
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono")
CONSONANTS, VOWELS = "bdhlmnprstvz", "aeiou"
COLOURS = {
    "red": (205, 30, 40),
    "green": (30, 140, 60),
    "blue": (40, 70, 205),
    "orange": (240, 150, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("one", "two", "three", "four", "five")
BARS = "ABCD"
MEAN, DEVIATION = 0.93, 0.25  # of the levels that models see: paper is near 0, ink far from it
CELLS, CELL = 16, 16  # a scene is 4 x 4 cells of 16 pixels
BAR_UNIT = 5  # pixels of height


class Asked(NamedTuple):
    """A picture (SIZE, SIZE, 3) of 8 bits, its question and answer, and what is seen in it."""

    kind: str
    picture: np.ndarray
    question: str
    answer: str
    content: tuple


def is_held_out(content: tuple) -> bool:
    return zlib.crc32(repr(content).encode()) % HELD_OUT_PART == 0


def paper(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(220, 255) for _ in range(3)))
    return picture, ImageDraw.Draw(picture)


def ink(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(0, 110), rng.randint(0, 110), rng.randint(0, 110)


@lru_cache(None)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        str(Path(matplotlib.get_data_path(), "fonts/ttf", name + ".ttf")), size
    )


def drawn_until(rng: random.Random, held_out: bool, draw: Callable[[], tuple]) -> tuple:
    """The first content of this part."""
    while True:
        content = draw()
        if is_held_out(content) == held_out:
            return content


def ask_word(rng: random.Random, held_out: bool) -> Asked:
    def letters() -> tuple:
        return ("word", "".join(map(rng.choice, (CONSONANTS, VOWELS, CONSONANTS))))

    content = drawn_until(rng, held_out, letters)
    picture, draw = paper(rng)
    name, size = rng.choice(FONTS), rng.randint(26, 30)
    left, _, right, _ = font(name, size).getbbox(content[1])
    while right - left > SIZE - 4:
        size -= 1
        left, _, right, _ = font(name, size).getbbox(content[1])
    x = rng.randint(2, min(8, SIZE - 2 - (right - left))) - left
    y = 16 + rng.randint(-3, 3)  # one baseline, but for this
    draw.text((x, y), content[1], font=font(name, size), fill=ink(rng))
    return Asked("word", np.asarray(picture), "Which word is written?", content[1], content)


@lru_cache(None)
def handwriting() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # seconds, of those who draw alone

    source = load_digits()
    return source.images, source.target


def ask_number(rng: random.Random, held_out: bool) -> Asked:
    images, labels = handwriting()
    pair = tuple(
        drawn_until(rng, held_out, lambda: ("digit", rng.randrange(len(labels))))[1]
        for _ in range(2)
    )
    picture, _ = paper(rng)
    pixels = np.asarray(picture).astype(np.float32)
    for place, index in enumerate(pair):
        side = rng.randint(24, 30)
        grey = Image.fromarray((images[index] * (255 / 16)).astype(np.uint8))
        strokes = np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC)) / 255
        x = 32 * place + rng.randint(0, 32 - side)
        y = (SIZE - side) // 2 + rng.randint(-8, 8)
        part = pixels[y : y + side, x : x + side]
        part += strokes[:, :, None] * (np.array(ink(rng)) - part)
    answer = "".join(str(labels[index]) for index in pair)
    content = ("number", *pair)
    picture_levels = pixels.round().astype(np.uint8)
    return Asked("number", picture_levels, "Which number is written by hand?", answer, content)


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: tuple[int, ...], colour: tuple) -> None:
    x0, y0, x1, y1 = box
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(x0, y1), (x1, y1), ((x0 + x1) // 2, y0)], fill=colour)
    else:
        draw.line([(x0, y0), (x1, y1)], fill=colour, width=3)
        draw.line([(x0, y1), (x1, y0)], fill=colour, width=3)


def ask_count(rng: random.Random, held_out: bool) -> Asked:
    """Others share the colour or the shape that is asked for, so that both have to be read."""

    def scene() -> tuple:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        things = [(colour, shape)] * rng.randint(1, len(NUMBERS))
        others = [(c, shape) for c in COLOURS if c != colour]
        others += [(colour, s) for s in SHAPES if s != shape]
        things += [rng.choice(others) for _ in range(rng.randint(0, 4))]
        cells = rng.sample(range(CELLS), len(things))
        return ("count", colour, shape, *sorted(zip(cells, things, strict=True)))

    content = drawn_until(rng, held_out, scene)
    _, colour, shape, *things = content
    picture, draw = paper(rng)
    for cell, (its_colour, its_shape) in things:
        side = rng.randint(9, 13)
        x = CELL * (cell % 4) + rng.randint(1, CELL - side - 2)
        y = CELL * (cell // 4) + rng.randint(1, CELL - side - 2)
        levels = tuple(max(0, min(255, v + rng.randint(-15, 15))) for v in COLOURS[its_colour])
        draw_shape(draw, its_shape, (x, y, x + side, y + side), levels)
    number = sum(thing == (colour, shape) for _, thing in things)
    question = f"How many {colour} {shape}s are there?".replace("crosss", "crosses")
    return Asked("count", np.asarray(picture), question, NUMBERS[number - 1], content)


def ask_bars(rng: random.Random, held_out: bool) -> Asked:
    content = drawn_until(rng, held_out, lambda: ("bars", *(rng.randint(1, 9) for _ in BARS)))
    values = content[1:]
    picture, draw = paper(rng)
    line, left = ink(rng), rng.randint(5, 8)
    floor = SIZE - 13
    for value in range(1, 10):
        length = 4 if value % 5 == 0 else 2
        y = floor - BAR_UNIT * value
        draw.line([(left - length, y), (left, y)], fill=line)
    draw.line([(left, 2), (left, floor), (SIZE - 2, floor)], fill=line)
    for place, (name, value) in enumerate(zip(BARS, values, strict=True)):
        x = left + 3 + 13 * place
        colour = rng.choice(list(COLOURS.values()))
        draw.rectangle((x, floor - BAR_UNIT * value, x + 9, floor - 1), fill=colour)
        draw.text((x + 2, floor + 1), name, font=font("DejaVuSans", 9), fill=line)
    highest = max(values)
    if values.count(highest) == 1 and rng.random() < 0.5:
        answer = f"{BARS[values.index(highest)]} with {highest}"
        question = "Which bar is the highest?"
    else:
        place = rng.randrange(len(BARS))
        answer, question = str(values[place]), f"What is the value of {BARS[place]}?"
    return Asked("bars", np.asarray(picture), question, answer, content)


KINDS: dict[str, Callable[[random.Random, bool], Asked]] = {
    "word": ask_word,
    "number": ask_number,
    "count": ask_count,
    "bars": ask_bars,
}


def ask(index: int, *, seed: str, held_out: bool) -> Asked:
    """The picture of this place; kinds take turns."""
    kind = list(KINDS)[index % len(KINDS)]
    return KINDS[kind](random.Random(f"{seed} {index}"), held_out)


def ask_many(number: int, *, seed: str, held_out: bool, workers: int = 1) -> list[Asked]:
    draw = partial(ask, seed=seed, held_out=held_out)
    if workers == 1:
        return [draw(index) for index in range(number)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        return list(pool.map(draw, range(number), chunksize=500))


def save(asked: Sequence[Asked], path: Path) -> None:
    columns = {name: [getattr(a, name) for a in asked] for name in ("kind", "question", "answer")}
    np.savez(path, picture=np.stack([a.picture for a in asked]), **columns)


class Pictures(NamedTuple):
    """Pictures as a file has them, (N, SIZE, SIZE, 3) of 8 bits, and texts."""

    picture: np.ndarray
    kind: list[str]
    question: list[str]
    answer: list[str]

    def __len__(self) -> int:
        return len(self.kind)

    @classmethod
    def load(cls, path: Path) -> "Pictures":
        with np.load(path) as file:
            texts = [file[name].tolist() for name in ("kind", "question", "answer")]
            return cls(file["picture"], *texts)

    @classmethod
    def of(cls, asked: Sequence[Asked]) -> "Pictures":
        texts = [[getattr(a, name) for a in asked] for name in ("kind", "question", "answer")]
        return cls(np.stack([a.picture for a in asked]), *texts)

    def first(self, number: int) -> "Pictures":
        return Pictures(*(part[:number] for part in self))

"""Handwritten digits as pictures, and the question and answer rows made of them.

The 1797 pictures of scikit-learn's load_digits (8 x 8, 17 grey levels) come inside the package, so
nothing is downloaded. Upscaled to 32 x 32 they give a Qwen3-VL processor 4 image tokens each.
"""

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

PICTURE_SIZE = 32
NUM_HELD_OUT = 360  # a fifth of the pictures; the split never depends on the seed of a run
DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
QUESTIONS = (
    "Which digit is in the picture?",
    "What number does the picture show?",
    "Read the handwritten digit.",
    "Name the digit that was written here.",
)
_ANSWER = re.compile(rf"The digit is ({'|'.join(DIGIT_NAMES)}), an (odd|even) number\.")


@dataclass(frozen=True)
class Digits:
    """Pictures with the digits that they show."""

    pictures: list[Image.Image]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.pictures)


def load_pictures(
    num_train: int | None = None, num_held_out: int | None = None
) -> tuple[Digits, Digits]:
    """Return (training, held-out) pictures, only the first ones where a number is given."""
    source = load_digits()
    order = np.random.default_rng(0).permutation(len(source.target))
    held_out, train = order[:NUM_HELD_OUT], order[NUM_HELD_OUT:][:num_train]

    def select(rows: np.ndarray) -> Digits:
        return Digits([make_picture(source.images[i]) for i in rows], source.target[rows].tolist())

    return select(train), select(held_out[:num_held_out])


def make_picture(grey: np.ndarray) -> Image.Image:
    """Turn (8, 8) ink values from 0 to 16 into a picture with dark ink on white paper."""
    ink = Image.fromarray((255 - grey * (255 / 16)).astype(np.uint8))
    return ink.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC).convert("RGB")


def question_of(row: int) -> str:
    """Return the question asked about the picture in this row: the wordings take turns."""
    return QUESTIONS[row % len(QUESTIONS)]


def answer_of(digit: int) -> str:
    """Return the sentence that names this digit."""
    return f"The digit is {DIGIT_NAMES[digit]}, an {parity_of(digit)} number."


def parity_of(digit: int) -> str:
    """Return "odd" or "even"."""
    return "odd" if digit % 2 else "even"


def parse_answer(answer: str) -> int | None:
    """Return the digit that a generated answer names.

    None where the answer is anything but one whole sentence, or where it gets the digit's parity
    wrong: such an answer counts as wrong whatever the picture shows.
    """
    match = _ANSWER.fullmatch(answer.strip())
    if match is None:
        return None
    digit = DIGIT_NAMES.index(match[1])
    return digit if match[2] == parity_of(digit) else None


def make_prompt(question: str) -> list[dict]:
    """Return the conversation that asks a question about one picture."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def make_rows(digits: Digits, is_labelled: bool) -> list[dict]:
    """Return GOLD rows: a prompt, one picture, and the answer as completion only if is_labelled."""
    rows = []
    for row, (picture, label) in enumerate(zip(digits.pictures, digits.labels, strict=True)):
        columns = {"prompt": make_prompt(question_of(row)), "images": [picture]}
        if is_labelled:
            columns["completion"] = [{"role": "assistant", "content": answer_of(label)}]
        rows.append(columns)
    return rows

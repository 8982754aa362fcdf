"""The report of `gold-trainer check`: tables, and examples with what is scored of them.

On a terminal scored tokens are coloured; elsewhere they stand in brackets, without colour codes.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gold_trainer.batches import Example, WindowBatch
from gold_trainer.checking.counts import SplitReport
from gold_trainer.config import GOLDConfig

NUM_KINDS = 20  # of refusals
PLAIN_WIDTH = 120
PROMPT_CHARACTERS = 1500
NUM_TOKENS = 300  # of a completion
STYLES = ("black on green", "black on bright_cyan")  # token by token


def make_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def print_split(console: Console, report: SplitReport, args: GOLDConfig) -> None:
    _line(console, f"\n{report.name}: {report.num_rows} rows, {report.num_refused} refused")
    if report.refusals:
        _print_refusals(console, report)
    table = Table("tokens, pictures", "min", "median", "p95", "max", box=None, pad_edge=False)
    for name, values in report.distributions().items():
        table.add_row(name, *(f"{value:.0f}" for value in values.values()))
    if table.row_count:
        console.print(table)
    for name, share in report.shares(args).items():
        _line(console, f"{name}: {share:.2%}")
    for name, value in report.alignment().items():
        _line(console, f"{name}: {value:.3g}")


def _print_refusals(console: Console, report: SplitReport) -> None:
    table = Table("refused", "rows", "share", "first of them", box=None, pad_edge=False)
    kinds = report.sorted_refusals()
    for kind in kinds[:NUM_KINDS]:
        rows = ", ".join(map(str, kind.rows)) + (", ..." if kind.count > len(kind.rows) else "")
        share = f"{kind.count / report.num_rows:.2%}"
        table.add_row(kind.reason, str(kind.count), share, rows)
    console.print(table)
    if len(kinds) > NUM_KINDS:
        _line(console, f"... and {len(kinds) - NUM_KINDS} kinds more")
    for kind in kinds[:NUM_KINDS]:
        _line(console, f"  {kind.reason}: {kind.message}")


def print_examples(
    console: Console,
    batches: Sequence[WindowBatch],  # of one example each
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    has_colour = console.is_terminal and console.color_system is not None and not console.no_color
    how = "in colour" if has_colour else "in brackets"
    for batch in batches:
        (student,), (teacher,) = batch.examples, batch.teacher_examples
        sides = {"student and teacher": (student, "student")}
        if batch.teacher_examples is not batch.examples:
            sides = {"student": (student, "student"), "teacher": (teacher, "teacher")}
        table = Table(title=f"{student.where}: scored tokens {how}", show_lines=True)
        is_other = teacher.images != student.images  # the teacher sees pictures of its own
        cells = []
        for title, (example, side) in sides.items():
            table.add_column(title, overflow="fold")
            scored = _scored(batch, side, example)
            cells.append(_rendered(example, tokenizers[side], scored, has_colour, is_other))
        table.add_row(*cells)
        console.print(table)


def _scored(batch: WindowBatch, side: str, example: Example) -> set[int]:
    """Places of tokens of the completion: all, or with two tokenizers those in a group."""
    if batch.alignment is None:
        return set(range(len(example.completion_ids or ())))
    rows = batch.alignment.groups.sides[("student", "teacher").index(side)]
    return {*rows[0].tolist(), *rows[2].tolist()}


def _rendered(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    scored: set[int],
    has_colour: bool,
    shows_pictures: bool,
) -> Text:
    prompt = example.prompt_text
    if len(prompt) > PROMPT_CHARACTERS:
        prompt = f"... {prompt[-PROMPT_CHARACTERS:]}"
    sizes = ", ".join(f"{image.width} x {image.height}" for image in example.images)
    text = Text(f"({sizes}) {prompt}" if shows_pictures else prompt)
    if example.completion_ids is None:
        return text.append(" (the completion is written in training)", style="italic")
    for place, piece in enumerate(pieces_of(tokenizer, example.completion_ids[:NUM_TOKENS])):
        if place not in scored:
            text.append(piece)
        elif has_colour:
            text.append(piece, style=STYLES[place % len(STYLES)])
        else:
            text.append(f"[{piece}]")
    if len(example.completion_ids) > NUM_TOKENS:
        text.append(" ...")
    return text


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What each token adds to the text; "" of one that ends within a character."""
    pieces, written = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        if end < len(ids):
            text = text.rstrip("\ufffd")
        pieces.append(text[len(written) :])
        written = text if len(text) > len(written) else written
    return pieces


def _line(console: Console, text: str) -> None:
    """Print text as it is: neither wrapped nor read for markup."""
    console.print(text, markup=False, soft_wrap=True)

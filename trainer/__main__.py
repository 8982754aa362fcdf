"""The commands `python -m gold_trainer train` and `python -m gold_trainer demo`."""

import sys

from rich.console import Console

USAGE = """\
usage: gold-trainer train [CONFIG.yaml] [--field value ...]   distil a teacher into a student
       gold-trainer train --help                              every field, with its default
       gold-trainer demo [--output_dir runs/demo]             handwritten digits, no download
"""


def main(argv: list[str]) -> int:
    """Run one command; the exit code is 0, or 2 where the user's input has to change."""
    command, rest = (argv[0], argv[1:]) if argv else (None, [])
    if command == "train":
        from gold_trainer.command_line import train

        return train(rest)
    if command == "demo":
        from gold_trainer.command_line import demo

        return demo(rest)
    if command in ("-h", "--help"):
        Console(highlight=False).print(USAGE, end="", markup=False, soft_wrap=True)
        return 0
    console = Console(stderr=True, highlight=False)
    if command is not None:
        console.print(f"error: unknown command {command!r}", markup=False, soft_wrap=True)
    console.print(USAGE, end="", markup=False, soft_wrap=True)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

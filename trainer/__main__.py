"""The commands of `gold-trainer`, which is `python -m gold_trainer`.

What the user can mend ends as one message and exit code 2, its traceback is logged at level debug;
any other error as one line and exit code 1, with its traceback in a file.
Torch and transformers are imported by the command that needs them: usage and its errors are quick.
"""

import argparse
import logging
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from gold_trainer import configs, flags
from gold_trainer.nearest import nearest
from gold_trainer.quiet import WARN_OF_THEMSELVES, quiet
from gold_trainer.recipes import FOLDER, find_config, recipe_names

logger = logging.getLogger("gold_trainer")

EXIT_ERROR = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as a shell has it of Ctrl-C; SIGTERM is 143

REMEDIES = {  # by the name of an error: its class may be that of a library that is not imported
    "OutOfMemoryError": " `gold-trainer plan` with the same arguments and --gpu_memory GIB says "
    "what to set.",
}

USAGE = """\
usage: gold-trainer train [RECIPE | CONFIG.yaml] [--field value ...]
                                                   distil a teacher into a student
       gold-trainer train --help                   the fields, with their defaults
       gold-trainer train --help-all               those of transformers too
       gold-trainer check [RECIPE | CONFIG.yaml] [--field value ...]
                                                   read all rows first, train nothing
       gold-trainer cache-teacher [RECIPE | CONFIG.yaml] [--field value ...]
                                                   run the teacher once, keep what it says in
                                                   teacher_cache, which training reads
       gold-trainer plan [RECIPE | CONFIG.yaml] [--field value ...] [--gpu_memory GIB]
                                                   the run's peak memory, and what would make it fit
       gold-trainer vllm-command [RECIPE | CONFIG.yaml] [--field value ...]
                                                   the line that starts the run's vLLM server
       gold-trainer teacher-command [RECIPE | CONFIG.yaml] [--field value ...]
                                                   the line that starts the vLLM server of the run's
                                                   teacher
       gold-trainer recipes                        files of recipes, and of engines for several GPUs
       gold-trainer demo [--output_dir runs/demo]  handwritten digits, no download
       gold-trainer COMMAND --help                 what a command does, and takes
       gold-trainer --version
"""

CHECK_USAGE = """\
usage: gold-trainer check [RECIPE | CONFIG.yaml] [--field value ...]

Reads every row that `gold-trainer train` would read with the same arguments, and makes both models
of their configs alone. Prints what is refused, lengths in tokens, pictures, what is cut, and
examples. Exit code 0, 1 where a row is refused, 2 where a field or the pair of models is.
check-data is another name of it. Fields are those of `gold-trainer train --help`, and:

  --num_examples
      Rows to show as both sides see them, with the scored tokens marked. [2]
  --output
      A file for the report as JSON.
  --dataloader_num_workers
      Processes that read; 0: as many as there are cores, up to 16. A stream is read by one, as
      far as max_steps goes. [0]
"""

PLAN_USAGE = """\
usage: gold-trainer plan [RECIPE | CONFIG.yaml] [--field value ...]

Prints the peak memory of a GPU that `gold-trainer train` would have with the same arguments, by
part. Models are made of their configs alone: no weights are read and no GPU is needed. Exit code 0,
1 where the run does not fit gpu_memory, 2 where a field or the pair of models is refused. Fields
are those of `gold-trainer train --help`, and:

  --engine
      single, ddp, fsdp2, zero2 or zero3. [single, with several GPUs ddp]
  --gpus
      Processes, one a GPU. [1]
  --gpu_memory
      GiB that a GPU has; with it come the fields to add where the run does not fit.
  --tokens
      Tokens of each row. [those of the longest of 64 rows]
"""

VLLM_USAGE = """\
usage: gold-trainer vllm-command [RECIPE | CONFIG.yaml] [--field value ...]

Prints the line that starts the vLLM server to which `gold-trainer train` goes for rollouts with the
same arguments, use_vllm among them: what the run needs is in it. Run the line in an environment
that has vLLM, then train. Fields are those of `gold-trainer train --help`.
"""

TEACHER_USAGE = """\
usage: gold-trainer teacher-command [RECIPE | CONFIG.yaml] [--field value ...]

Prints the line that starts the vLLM server of the teacher, for the run of `gold-trainer train` with
the same arguments: teacher_model_name_or_path, the checkpoint to serve, and
teacher_model_server_url, where. Run the line in an environment that has vLLM, then train. Fields
are those of `gold-trainer train --help`.
"""

RECIPES_USAGE = """\
usage: gold-trainer recipes

Lists the recipes that a command takes by name, with their files: a start for a file of your own.
Then the files that `accelerate launch --config_file` takes, one for each engine of several GPUs.
"""

CACHE_USAGE = """\
usage: gold-trainer cache-teacher [RECIPE | CONFIG.yaml] [--field value ...]

Runs the teacher once over all rows that `gold-trainer train` would score with the same arguments.
Into the folder teacher_cache go its last hidden states at the scored tokens, and its head; with
another teacher_cache_form, or with loss_top_k, what that form holds in place of them. Training with
the same teacher_cache gives the same loss without the teacher's weights. Disk need is printed
first. A run that was stopped goes on where it was; rows that are new are added. `accelerate launch
-m gold_trainer cache-teacher` shares the rows among processes. Fields are those of `gold-trainer
train --help`, and:

  --cache_dtype
      Type of the hidden states: auto, bfloat16, float16 or float32. auto is the teacher's own, or
      bf16's or fp16's; bfloat16 where that is float32. [auto]
  --cache_batch_size
      Rows that the teacher sees at a time. [per_device_train_batch_size]
  --cache_shard_mib
      MiB of a file; a run that is killed loses the file that it was writing. [256]
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 where check finds rows that are refused, 2 where the
    user's input has to change, 1 for another error, 130 and 143 after SIGINT and SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else (None, [])
    if command in COMMANDS:
        return _report_errors(COMMANDS[command], rest)
    if command in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if command == "--version":
        from gold_trainer import __version__

        sys.stdout.write(f"gold-trainer {__version__}\n")
        return 0
    if command is None:
        sys.stderr.write(USAGE)
    else:
        meant = nearest(command, COMMANDS)
        hint = (
            f"did you mean gold-trainer {meant}?" if meant else f"it may be {', '.join(COMMANDS)}"
        )
        sys.stderr.write(f"error: unknown command {command!r}; {hint}\n")
    return EXIT_USER_ERROR


def _known(argv: list[str], own: Collection[str] = ()) -> list[str]:
    """The arguments with the path of a recipe; ValueError for names that there are not, before
    anything slow is imported. own: names of the command itself.
    """
    with _needing("trainer"):
        if argv and not argv[0].startswith("-"):
            argv = [str(find_config(argv[0])), *argv[1:]]
            flags.read_fields(Path(argv[0]))
        flags.check_names(name for name in argv if name.partition("=")[0] not in own)
    return argv


def _load(module: str, name: str, extra: str = "trainer") -> Any:
    """What a command runs, imported now; extra: of the packages that it needs."""
    with _needing(extra), quiet(*WARN_OF_THEMSELVES):
        return getattr(import_module(f"gold_trainer.{module}"), name)


@contextmanager
def _needing(extra: str) -> Iterator[None]:
    """A missing package ends as one line: who installs the losses alone has none of the extras."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"a package that is needed here is missing ({error}): pip install "
            f"'gold-kernels[{extra}]'"
        ) from error


def _train(argv: list[str]) -> None:
    if {"-h", "--help"} & set(argv):
        with _needing("trainer"):
            sys.stdout.write(flags.help_text())
        raise SystemExit(0)
    argv = _known(argv)
    argv = ["--help" if flag in ("--help-all", "--help_all") else flag for flag in argv]
    _load("command_line", "train")(argv)


def _of_a_run(
    argv: list[str],  # those of train, and the command's own
    usage: str,
    module: str,
    name: str,
    own: Collection[str] = (),
) -> int:
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(usage)
        return 0
    argv = _known(argv, own)
    return _load(module, name)(argv) or 0


def _check(argv: list[str]) -> int:
    own = ("--num_examples", "--output")
    return _of_a_run(argv, CHECK_USAGE, "checking.command", "check", own)


def _plan(argv: list[str]) -> int:
    own = ("--engine", "--gpus", "--gpu_memory", "--gpu-memory", "--tokens")
    return _of_a_run(argv, PLAN_USAGE, "planning.command", "plan", own)


def _cache_teacher(argv: list[str]) -> int:
    own = ("--cache_dtype", "--cache_batch_size", "--cache_shard_mib")
    return _of_a_run(argv, CACHE_USAGE, "caching.command", "cache_teacher", own)


def _demo(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="gold-trainer demo",
        description="A tiny teacher learns handwritten digits and a smaller student learns from "
        "it, on the CPU if there is no GPU. Nothing is downloaded. It takes about three minutes on "
        "two CPU cores.",
    )
    parser.add_argument(
        "--pair",
        choices=("same", "cross"),
        default="same",
        help="cross: a student of another family with another tokenizer; default: %(default)s",
    )
    parser.add_argument("--output_dir", help="default: runs/demo, runs/demo_cross")
    arguments = parser.parse_args(argv)
    run_demo = _load("demo", "run_demo", "demo")
    default = "runs/demo_cross" if arguments.pair == "cross" else "runs/demo"
    run_demo(arguments.output_dir or default, pair=arguments.pair)


def _vllm_command(argv: list[str]) -> int:
    return _of_a_run(argv, VLLM_USAGE, "writers.vllm.command", "vllm_command")


def _teacher_command(argv: list[str]) -> int:
    return _of_a_run(argv, TEACHER_USAGE, "teachers.served.start_line", "teacher_command")


def _recipes(argv: list[str]) -> None:
    if argv in (["-h"], ["--help"]):
        sys.stdout.write(RECIPES_USAGE)
        return
    if argv:
        raise ValueError(f"gold-trainer recipes: no arguments are expected, got {argv[0]!r}")
    for name in recipe_names():
        sys.stdout.write(f"{name:16} {FOLDER / name}.yaml\n")
    sys.stdout.write("for accelerate launch --config_file:\n")
    for name in configs.ENGINES:
        sys.stdout.write(f"{name:16} {configs.FOLDER / name}.yaml\n")


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": _train,
    "check": _check,
    "check-data": _check,
    "plan": _plan,
    "cache-teacher": _cache_teacher,
    "demo": _demo,
    "recipes": _recipes,
    "teacher-command": _teacher_command,
    "vllm-command": _vllm_command,
}


def _report_errors(command: Callable[[list[str]], int | None], argv: list[str]) -> int:
    try:
        return command(argv) or 0
    except KeyboardInterrupt as stop:
        if not stop.args:  # the trainer says what it has saved
            sys.stderr.write("error: interrupted\n")
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError) as error:  # ImportError: flash_attention_2 and such
        logger.debug("traceback of the message below", exc_info=True)
        sys.stderr.write(f"error: {' '.join(_message(error).split())}\n")
        return EXIT_USER_ERROR
    except FloatingPointError as error:  # NaN and inf: the message has all there is to say
        sys.stderr.write(f"error: {error}\n")
        return EXIT_ERROR
    except Exception as error:
        with tempfile.NamedTemporaryFile(
            "w", prefix="gold-trainer-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            traceback.print_exception(error, file=file)
        text = _message(error).strip().partition("\n")[0] + REMEDIES.get(type(error).__name__, "")
        sys.stderr.write(f"error: {type(error).__name__}: {text} (traceback: {file.name})\n")
        return EXIT_ERROR


def _message(error: Exception) -> str:
    """The sentence that was raised; a data loader worker wraps it in its own traceback."""
    text = str(error)
    # the last error of those that led to one another
    worker = re.match(r"Caught \w+ in DataLoader worker.*\n[\w.]*Error: ", text, re.DOTALL)
    return text[worker.end() :].strip() if worker else text


if __name__ == "__main__":
    sys.exit(main())

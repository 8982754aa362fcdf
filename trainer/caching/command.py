"""`gold-trainer cache-teacher`: runs the teacher once, and keeps what it says of every row.

All that a run with the same config scores, of its training and evaluation rows. A run that was
stopped goes on where it was. Several processes (accelerate launch) share the rows.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from gold_trainer import refusals
from gold_trainer.caching import store
from gold_trainer.caching.facts import (
    facts_of_args,
    facts_of_processor,
    facts_of_teacher,
    refuse_other_facts,
)
from gold_trainer.caching.means import MeansEncoder
from gold_trainer.caching.run import Caching, Encoder
from gold_trainer.caching.store import Manifest
from gold_trainer.caching.top_k import TopKEncoder
from gold_trainer.command_line import Run, read_run
from gold_trainer.fields.teacher import args_by_teacher
from gold_trainer.preparing import Prepared, prepare
from gold_trainer.ranks import on_main_process
from gold_trainer.survival import run_lock
from gold_trainer.survival.run_lock import RunLock
from gold_trainer.teachers.named import live_source

DTYPES = ("auto", "bfloat16", "float16", "float32")


def cache_teacher(argv: list[str]) -> int:
    """The exit code; ValueError for what the user can mend."""
    own, argv = _own_arguments(argv)
    run = read_run(argv)
    _folder(run)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked
    args, state = run.config, PartialState(cpu=run.config.use_cpu)
    refusals.refuse_unusable(run.student, run.teacher, args, None, None, None, run.peft_config)
    prepared = prepare(run.student, run.teacher, args)
    several = args_by_teacher(args)
    for key, one in several.items():
        of_one = run._replace(teacher=live_source(one), config=one)
        _cache(of_one, prepared, own, state, key)
    if not several:
        _cache(run, prepared, own, state)
    return 0


def _cache(
    run: Run,
    prepared: Prepared,
    own: argparse.Namespace,
    state: PartialState,
    teacher_id: str | None = None,  # of several, whose rows are kept alone
) -> None:
    args, folder = run.config, _folder(run)
    caching = Caching(run, prepared, folder, state, own.cache_batch_size, teacher_id)
    encoder = _encoder(run, prepared, own.cache_dtype, caching)
    facts = {
        "teacher_cache_form": encoder.form,
        **facts_of_args(args),
        **facts_of_teacher(args, str(run.teacher)),
        **facts_of_processor(prepared.teacher_processor),
        **encoder.facts,
    }
    lock = RunLock(str(folder), "teacher_cache")
    on_main_process(state, lock.acquire)
    try:
        manifest = on_main_process(state, lambda: _earlier(folder, facts))
        caching.run(encoder, manifest, facts, int(own.cache_shard_mib * 2**20))
    finally:
        if state.is_main_process:
            lock.release()


def _encoder(run: Run, prepared: Prepared, dtype: str, caching: Caching) -> Encoder:
    form = run.config.form_to_make
    if form == "hidden":
        return Encoder(dtype, caching.sides[1])
    if dtype not in ("auto", "float32"):
        raise ValueError(
            f"gold-trainer cache-teacher: cache_dtype must be float32 or auto with "
            f"teacher_cache_form={form}, got {dtype!r}; leave it out."
        )
    if form == "top_k":
        return TopKEncoder(run.config, *caching.sides)
    return MeansEncoder(run, prepared)


def _own_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of the command itself, and the rest, which are a run's."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--cache_dtype", default="auto")
    parser.add_argument("--cache_shard_mib", default="256")
    parser.add_argument("--cache_batch_size")
    own, argv = parser.parse_known_args(argv)
    if own.cache_dtype not in DTYPES:
        raise ValueError(
            f"gold-trainer cache-teacher: cache_dtype must be one of {', '.join(DTYPES)}, got "
            f"{own.cache_dtype!r}; auto is 16-bit."
        )
    if own.cache_batch_size is not None:
        size = _number("cache_batch_size", own.cache_batch_size, is_whole=True)
        own.cache_batch_size = int(size)
    own.cache_shard_mib = _number("cache_shard_mib", own.cache_shard_mib)
    return own, argv


def _number(name: str, text: str, *, is_whole: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf or (is_whole and value != int(value)):
        kind = "a whole number, at least 1" if is_whole else "a number above 0"
        raise ValueError(
            f"gold-trainer cache-teacher: {name} must be {kind}, got {text!r}; leave it out for "
            "its default."
        )
    return value


def _folder(run: Run) -> Path:
    """Where the cache goes; ValueError for runs that have none."""
    args = run.config
    if args.teacher_cache is None:
        raise ValueError(
            "gold-trainer cache-teacher: teacher_cache must be the folder to write to, got None; "
            "set it in the YAML file or pass --teacher_cache."
        )
    if run.teacher is None:
        raise ValueError(
            "gold-trainer cache-teacher: teacher_model_name_or_path must be the teacher to run, "
            "got None; set it in the YAML file or pass it."
        )
    return Path(args.teacher_cache)


def _earlier(folder: Path, facts: dict[str, Any]) -> Manifest | None:
    """What an earlier run with the same facts has left, without what is damaged."""
    manifest = Manifest.read(folder)
    if manifest is None:
        own = {store.TEACHER, store.HEAD, run_lock.NAME}
        others = {path.name for path in folder.iterdir() if path.suffix != store.HALF} - own
        if others:
            raise ValueError(
                "gold-trainer cache-teacher: teacher_cache must be a new folder, or that of an "
                f"earlier run of this command, got {folder} with {min(others)}; choose another."
            )
    else:
        refuse_other_facts(str(folder), manifest.facts, facts)
    damaged = store.mend(folder, manifest or Manifest("", "", 0, {}, {}))
    if damaged:
        Console().print(f"damaged, to be written anew: {', '.join(damaged)}", markup=False)
    return manifest

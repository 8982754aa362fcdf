"""What surrounds a run: its lock, the checkpoint that it goes on from, and how it ends."""

import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers.trainer_utils import SaveStrategy, TrainOutput

from gold_trainer.config import GOLDConfig
from gold_trainer.ranks import on_main_process
from gold_trainer.refusals import refuse_no_batch
from gold_trainer.survival import checkpoints
from gold_trainer.survival.resuming import (
    as_wanted,
    check_settings,
    delete_earlier,
    find_checkpoint,
)
from gold_trainer.survival.run_lock import RunLock
from gold_trainer.survival.savable import check_savable
from gold_trainer.teachers.offloaded import delete_left

if TYPE_CHECKING:
    from gold_trainer.trainer import GOLDTrainer

logger = logging.getLogger(__name__)


def survive(
    trainer: "GOLDTrainer",
    wanted: str | bool | None,
    run: Callable[[str | None], TrainOutput],
) -> TrainOutput:
    """run, from the checkpoint that is wanted, with the output folder locked meanwhile."""
    args, accelerator, stopper = trainer.args, trainer.accelerator, trainer.stopper
    assert args.output_dir is not None, "TrainingArguments sets it"
    output_dir = args.output_dir
    lock = RunLock(output_dir)
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled

    # a run that saves none mixes none; one that trains on has made them
    keeps_earlier = args.save_strategy == "no" or trainer.state.global_step > 0

    refuse_no_batch(args, trainer.train_dataset)
    folders = [str(Path(f.name).resolve()) for f in getattr(trainer.teacher, "folders", ())]
    kept = gather_object(folders)  # of all ranks

    def start() -> str | None:
        student: Any = accelerator.unwrap_model(trainer.model)
        processor = trainer.prepared.student_processor
        is_due = args.save_strategy != "no" or trainer.saves_at_end
        check_savable(student, processor, args, is_due=is_due)
        lock.acquire()
        checkpoints.refuse_others(output_dir, args.save_total_limit)
        delete_left(output_dir, kept)
        if args.overwrite_output_dir and as_wanted(wanted) in (None, False):
            delete_earlier(output_dir)
        checkpoint = find_checkpoint(
            wanted,
            output_dir,
            student,
            keeps_earlier=keeps_earlier,
            is_sharded=is_sharded,
            num_ranks=args.world_size,
        )
        if checkpoint is not None:
            rows = trainer.train_dataset
            check_settings(Path(checkpoint), args, trainer.objective.weighting, rows)
        return checkpoint

    try:
        checkpoint = on_main_process(accelerator, start)
        _begin_logs(trainer)
        stopper.install()
        try:
            output = run(checkpoint)
        except BaseException as error:
            _leave(trainer, error)
            raise
        finally:
            stopper.uninstall()
            trainer.window_source.close()
    finally:
        if accelerator.is_main_process:
            lock.release()
    if stopper.must_stop:
        _end(trainer)
    return output


def _begin_logs(trainer: "GOLDTrainer") -> None:
    """Nothing that an earlier run of this trainer has left is logged with this one."""
    trainer.windows["train"].begin()
    trainer.guard.start_log()
    trainer.rollouts.begin()


def _leave(trainer: "GOLDTrainer", error: BaseException) -> None:
    """Save what the steps before the error have learnt, and say where it is."""
    args, state = trainer.args, trainer.state
    folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
    # of several ranks one alone may have the error: the others would not come to save
    can_save = args.world_size == 1 and args.save_strategy != "no" and isinstance(error, Exception)
    model: Any = trainer.model
    if can_save and state.global_step and not (folder / checkpoints.MARK).is_file():
        trainer.stopper.save_after(lambda: trainer._save_checkpoint(model, None))
    came = trainer.stopper.signal
    if trainer.is_world_process_zero() or came is None:
        # of several ranks the one with the error says so: the others are ended, wherever they are
        name = type(error).__name__ if came is None else came.name
        rank = f", rank {args.process_index}" if args.world_size > 1 else ""
        place = f"in step {state.global_step + 1}"
        if trainer.stopper.is_saving:
            place = f"while checkpoint-{state.global_step} was saved"
        logger.warning("GOLDTrainer: %s %s%s; %s.", name, place, rank, _where(args))
    if came not in (None, signal.SIGINT) and isinstance(error, Exception):
        # processes that were ended beside this one, a data loader's worker for instance
        raise SystemExit(128 + came) from error


def _end(trainer: "GOLDTrainer") -> None:
    """End the process after the step in which a signal came."""
    name = trainer.stopper.signal or signal.SIGTERM  # another rank has it
    step = trainer.state.global_step
    message = f"GOLDTrainer: stopped by {name.name} after step {step}; {_where(trainer.args)}."
    if trainer.is_world_process_zero():
        logger.warning(message)
    if name == signal.SIGINT:
        raise KeyboardInterrupt(message)
    raise SystemExit(128 + name)


def _where(args: GOLDConfig) -> str:
    newest, _ = checkpoints.find_newest(Path(args.output_dir or "."))
    if newest is None:
        is_off = SaveStrategy(args.save_strategy) == SaveStrategy.NO
        return "there is no checkpoint" + (" (save_strategy is 'no')" if is_off else " yet")
    return f"{newest} is complete, resume_from_checkpoint=True goes on from there"

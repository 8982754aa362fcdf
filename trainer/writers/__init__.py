"""Who completes prompts: one file a kind, chosen here."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from gold_trainer.config import GOLDConfig
from gold_trainer.rendering.collator import GOLDCollator
from gold_trainer.speed.compile_note import CompileNote
from gold_trainer.teachers.teacher import Teacher
from gold_trainer.writers.local import LocalWriter
from gold_trainer.writers.vllm.check import ServerInfo, connect
from gold_trainer.writers.vllm.engine import EngineWriter
from gold_trainer.writers.vllm.remote import VLLMWriter
from gold_trainer.writers.vllm.server import Server
from gold_trainer.writers.writer import Completion, Prompt, Sampling, Writer

__all__ = [
    "Completion",
    "LocalWriter",
    "Prompt",
    "Sampling",
    "VLLMWriter",
    "Writer",
    "connect",
    "make_writer",
    "make_writers",
]


def make_writer(
    writing: Callable[[], AbstractContextManager[nn.Module]],  # the model, ready to write
    collator: GOLDCollator,  # of its side
    args: GOLDConfig,
    side: str = "student",
    note: CompileNote | None = None,
) -> Writer:
    return LocalWriter(writing, collator, args, side, note)


def make_writers(
    student: nn.Module,  # itself: a trainer would be a cycle, which keeps DDP alive until the end
    teacher: Teacher,
    collators: Mapping[str, GOLDCollator],  # of "student" and "teacher"
    args: GOLDConfig,
    server: tuple[Server, ServerInfo] | None,  # that writes for the student
    note: CompileNote,
) -> dict[str, Writer]:
    writing: dict[str, Callable[[], AbstractContextManager[nn.Module]]] = {
        "student": lambda: nullcontext(student),
        "teacher": teacher.writing,
    }
    writers = {
        name: make_writer(writing[name], collators[name], args, name, note) for name in collators
    }
    if args.use_vllm and server is None:
        writers["student"] = EngineWriter(student, collators["student"], args)
    if server is not None:
        writers["student"] = VLLMWriter(*server, student, collators["student"], args)
    return writers

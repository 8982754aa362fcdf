"""Fields of GOLDConfig for the teacher: which model it is, and how it is loaded."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TeacherFields:
    """A teacher given by name; one that is an object was loaded with options of its own."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher: folder or hub id."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a teacher from the hub."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained for the teacher."}
    )

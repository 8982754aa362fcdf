"""Fields of GOLDConfig for the teacher: which model it is, and where its weights are."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch

SHARDINGS = ("fsdp",)
OFFLOADS = ("cpu", "disk")
# Arguments of from_pretrained with which transformers spreads one model over processes.
DISTRIBUTED = ("tp_plan", "tp_size", "device_mesh", "distributed_config")


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
    teacher_sharding: str | None = field(
        default=None,
        metadata={
            "help": "fsdp: each process holds a part of the teacher, whose layers are gathered "
            "when they run; whatever becomes of the student. None: each has all of it.",
            "choices": SHARDINGS,
        },
    )
    teacher_device: str | None = field(
        default=None,
        metadata={"help": "Another device for the teacher, as cuda:1, in a run of one process."},
    )
    teacher_offload: str | None = field(
        default=None,
        metadata={
            "help": "cpu: the teacher's layers are in host memory, disk: in files; they come to "
            "the device one after the other, while those before them compute.",
            "choices": OFFLOADS,
        },
    )

    def check_teacher(self) -> None:
        """ValueError for a device that there is not, and for what cannot be together."""
        if isinstance(self.teacher_model_init_kwargs, str):  # of a command line
            self.teacher_model_init_kwargs = json.loads(self.teacher_model_init_kwargs)
        self._check_init_kwargs()
        if self.teacher_sharding is not None:
            for name in ("teacher_device", "teacher_offload"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"GOLDConfig: {name} must be None with teacher_sharding, got "
                        f"{getattr(self, name)!r}; choose one of the two."
                    )
        if self.teacher_device is not None:
            _check_device(self.teacher_device)

    def _check_init_kwargs(self) -> None:
        given = self.teacher_model_init_kwargs or {}
        assert isinstance(given, dict), "check_teacher has read the JSON"
        for name in DISTRIBUTED:
            if name in given:
                raise ValueError(
                    f"GOLDConfig: teacher_model_init_kwargs must be without {name}, got "
                    f"{given[name]!r}: its ranks would have to see the same rows; set "
                    "teacher_sharding='fsdp'."
                )
        for name in ("teacher_sharding", "teacher_device", "teacher_offload"):
            if "device_map" in given and getattr(self, name) is not None:
                raise ValueError(
                    f"GOLDConfig: teacher_model_init_kwargs must be without device_map where "
                    f"{name} is set, got {given['device_map']!r}; choose one of the two."
                )
        for name in ("teacher_sharding", "teacher_offload"):
            if "quantization_config" in given and getattr(self, name) is not None:
                raise ValueError(
                    f"GOLDConfig: {name} must be None for a teacher in 8 or 4 bits, got "
                    f"{getattr(self, name)!r}; choose one of the two."
                )


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
        is_there = device.type == "cpu" or _count(device.type) > (device.index or 0)
    except (AttributeError, RuntimeError):  # no name of a device, or none that this torch has
        is_there = False
    if not is_there:
        there, gpu = ["cpu"], torch.accelerator.current_accelerator(check_available=True)
        if gpu is not None:
            there += [f"{gpu.type}:{index}" for index in range(_count(gpu.type))]
        raise ValueError(
            f"GOLDConfig: teacher_device must be one of {', '.join(there)}, got {name!r}; None "
            "puts the teacher where the student is."
        )


def _count(kind: str) -> int:
    return torch.get_device_module(kind).device_count()

"""Fields of GOLDConfig for the teacher: which model it is, and where its weights are: here, or in a
vLLM server.
"""

import json
from dataclasses import dataclass, field, fields
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


# Where the weights of a teacher are that is here.
PLACES = ("teacher_sharding", "teacher_device", "teacher_offload")


@dataclass
class ServedFields:
    """teacher_model_name_or_path is the checkpoint that the server was started with."""

    teacher_model_server_url: str | None = field(
        default=None,
        metadata={
            "help": "Address of a vLLM server that runs the teacher, `gold-trainer "
            "teacher-command` prints its start line; of the checkpoint norm and head are read here."
        },
    )
    teacher_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for that server when a run begins."}
    )
    teacher_request_timeout: float = field(
        default=600.0, metadata={"help": "Seconds that it may take for one row."}
    )
    teacher_request_retries: int = field(
        default=3,
        metadata={"help": "How often a row is asked for again where the server did not answer."},
    )

    @property
    def has_absent_teacher(self) -> bool:
        """Whether it is asked with examples, and needs no tensors of them."""
        args: Any = self  # a GOLDConfig
        return args.teacher_cache is not None or self.teacher_model_server_url is not None

    def check_served(self) -> None:
        """ValueError for what a server cannot do; an address in the teacher's place moves."""
        args: Any = self
        if is_address(args.teacher_model_name_or_path):
            take_address(args, args.teacher_model_name_or_path)
            args.teacher_model_name_or_path = None
        url = self.teacher_model_server_url
        if url is None:
            for one in fields(ServedFields):
                if getattr(self, one.name) != one.default:
                    raise ValueError(
                        f"GOLDConfig: {one.name} must be left out unless a server is the teacher, "
                        f"got {getattr(self, one.name)!r}; set teacher_model_server_url."
                    )
            return
        if not is_address(url):
            raise ValueError(
                "GOLDConfig: teacher_model_server_url must be an address like "
                f"http://localhost:8002, got {url!r}; begin it with http://."
            )
        self.teacher_model_server_url = url.rstrip("/").removesuffix("/v1")
        if args.seq_kd:
            raise ValueError(
                "GOLDConfig: seq_kd must be False with teacher_model_server_url, got True; the "
                "server is asked for hidden states alone: put its completions into the dataset."
            )
        for name in PLACES:
            if getattr(args, name) is not None:
                raise ValueError(
                    f"GOLDConfig: {name} must be None with teacher_model_server_url, got "
                    f"{getattr(args, name)!r}: its weights are where the server is; leave one of "
                    "them out."
                )
        if "quantization_config" in (args.teacher_model_init_kwargs or {}):
            raise ValueError(
                "GOLDConfig: teacher_model_init_kwargs must be without quantization_config with "
                "teacher_model_server_url, got one; start the server with --quantization."
            )


def is_address(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(("http://", "https://"))


def take_address(args: Any, url: str) -> None:  # a GOLDConfig
    """An address that came in the place of the teacher's name."""
    given = args.teacher_model_server_url
    if given not in (None, url):
        raise ValueError(
            "GOLDTrainer: one server must be the teacher, got "
            f"{url!r} and teacher_model_server_url={given!r}; leave one of them out."
        )
    args.teacher_model_server_url = url

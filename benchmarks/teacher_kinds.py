"""The kinds of teacher that a training step is measured with, as fields of GOLDConfig."""

import argparse
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qwen3_vl_shapes import build_teacher, processor_of_448_pixels

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
}
KINDS: dict[str, dict[str, Any]] = {
    "resident": {},
    "int8": {"teacher_model_init_kwargs": {"quantization_config": {"load_in_8bit": True}}},
    "nf4": {"teacher_model_init_kwargs": {"quantization_config": NF4}},
    "offload": {"teacher_offload": "cpu"},
    "fsdp": {"teacher_sharding": "fsdp"},
}
SAVED = tuple(kind for kind in KINDS if kind != "resident")  # read from a folder


def config_fields(kind: str, folder: Path) -> dict[str, Any]:
    """folder: where prepare_teacher has saved the teacher."""
    return dict(KINDS[kind])


def prepare_teacher(kinds: Collection[str], folder: Path, options: argparse.Namespace) -> None:
    """In a process of its own: this one keeps no memory of the device."""
    if set(kinds) & set(SAVED):
        command = [sys.executable, __file__, str(folder), *["--tiny"] * options.tiny]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    processor = processor_of_448_pixels()
    build_teacher(processor, given.tiny).save_pretrained(given.folder)
    processor.save_pretrained(given.folder)

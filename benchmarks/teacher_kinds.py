"""The kinds of teacher that a training step is measured with, as fields of GOLDConfig."""

import argparse
import json
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from qwen3_vl_shapes import build_teacher, processor_of_448_pixels, rows

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
    "cache": {},
    "fsdp": {"teacher_sharding": "fsdp"},
}
SAVED = tuple(kind for kind in KINDS if kind != "resident")  # read from a folder
CACHE = "cache"


def max_length(options: argparse.Namespace) -> int:
    return 512 + max(options.completion_tokens)


def config_fields(kind: str, folder: Path) -> dict[str, Any]:
    """folder: where prepare_teacher has saved the teacher."""
    return {"teacher_cache": str(folder / CACHE)} if kind == "cache" else dict(KINDS[kind])


def prepare_teacher(
    kinds: Collection[str],
    folder: Path,
    options: argparse.Namespace,
    num_rows: int,  # of a length, in the longest dataset of the launches
) -> None:
    """Prepare it in processes of their own: this one keeps no memory of the device."""
    if set(kinds) & set(SAVED):
        command = [sys.executable, __file__, str(folder), *["--tiny"] * options.tiny]
        subprocess.run(command, check=False)  # launches then say what is missing
    if "cache" in kinds:
        subprocess.run(cache_command(folder, options, num_rows), check=False)


def cache_command(folder: Path, options: argparse.Namespace, num_rows: int) -> list[str]:
    processor = processor_of_448_pixels()
    lines = []
    for length in options.completion_tokens:
        (row,) = rows(processor, length, 1)
        (picture,) = row["images"]
        picture.save(folder / "picture.png")
        lines += [json.dumps(row | {"images": ["picture.png"]})] * num_rows
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    fields = {
        "model_name_or_path": folder,  # of the student nothing is read but its config
        "teacher_model_name_or_path": folder,
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "caching",
        "teacher_cache": folder / CACHE,
        "max_length": max_length(options),
        "lmbda": 0.0,
        "bf16": torch.cuda.is_available(),
        "use_cpu": not torch.cuda.is_available(),
        "cache_batch_size": 1,
        "report_to": "none",
    }
    flags = [f"--{name}={value}" for name, value in fields.items()]
    return [sys.executable, "-m", "gold_trainer", "cache-teacher", *flags]


def save_teacher(folder: Path, is_tiny: bool) -> None:
    processor = processor_of_448_pixels()
    build_teacher(processor, is_tiny).save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    save_teacher(given.folder, given.tiny)

"""A user's command, in this process, on tiny models that lie in folders."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gold_trainer.__main__ import main
from support.tiny_models import save_tiny_pair

USER = {"role": "user", "content": "What is this?"}
ANSWER = {"role": "assistant", "content": "A bar."}
CHAT = {"messages": [USER, ANSWER]}
PLAIN = {"prompt": "1 + 1 =", "completion": " 2"}


@dataclass
class Case:
    """What is tried, and what a user has to see."""

    name: str
    rows: Any  # of rows.jsonl, or its text
    flags: str = ""
    code: int = 0
    says: str = ""  # a regular expression, of the error where the code is not 0
    family: str = "qwen3_vl"
    student: str | None = None  # a family of its own


def save_models(folder: Path, family: str) -> Path:
    """Student and teacher of a family in a folder, once."""
    if not (folder / family).exists():
        save_tiny_pair(folder / family, family)
    return folder / family


def walk(case: Case, models: Path, folder: Path, capfd: Any) -> str:
    """Run the case; no traceback, the exit code that it says, and one sentence where it is one."""
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text(
        case.rows if isinstance(case.rows, str) else "\n".join(map(json.dumps, case.rows))
    )
    student = save_models(models, case.student or case.family)
    argv = [
        *("train", "--model_name_or_path", str(student / "student")),
        *("--teacher_model_name_or_path", str(save_models(models, case.family) / "teacher")),
        *("--dataset_name", str(path), "--output_dir", str(folder / "run"), "--report_to", "none"),
        *("--max_steps", "1", "--per_device_train_batch_size", "2", "--use_cpu", "--lmbda", "0"),
        *("--learning_rate", "1e-3", "--save_strategy", "no", "--gradient_checkpointing", "no"),
        *(
            "--max_completion_length",
            "4",
            *shlex.split(case.flags.replace("{}", str(folder))),
        ),
    ]
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    shown = capfd.readouterr()
    everything = shown.out + shown.err
    assert "Traceback" not in everything, everything
    assert code == case.code, everything
    errors = [line for line in shown.err.split("\n") if "error: " in line]
    assert len(errors) == (code != 0), shown.err
    assert re.search(case.says, errors[0] if code else everything), everything
    return everything

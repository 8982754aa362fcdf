"""Files for `accelerate launch --config_file`, one an engine; `gold-trainer recipes` says where."""

from pathlib import Path

FOLDER = Path(__file__).parent
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")

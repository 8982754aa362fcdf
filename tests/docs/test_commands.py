"""Commands, YAML and tables of fields in README and docs/ name what there is."""

import re
import shlex
from pathlib import Path

import pytest

from gold_trainer import flags
from gold_trainer.__main__ import COMMANDS
from gold_trainer.config_file import read_mapping
from gold_trainer.recipes import recipe_names

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
OWN = {  # flags of a command itself, beside the fields of a run
    "check": {"num_examples", "output"},
    "plan": {"engine", "gpus", "gpu_memory", "tokens"},
    "cache-teacher": {"cache_dtype", "cache_batch_size", "cache_shard_mib"},
    "train": {"help", "help_all"},
}
COMMAND = re.compile(r"^(?:gold-trainer|.* -m gold_trainer) (.+)$", re.MULTILINE)

TABLES = re.compile(r"^\| field \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", re.MULTILINE)


def blocks(text: str, language: str = r"\w*") -> list[str]:
    found = re.findall(rf"^```({language})\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for _, block in found]


@pytest.mark.parametrize("page", TEXTS)
def test_commands_name_commands_recipes_and_flags_that_there_are(page):
    for line in COMMAND.findall("".join(blocks(TEXTS[page]))):
        command, *words = shlex.split(line, comments=True)
        assert command in COMMANDS or command == "--version", line
        names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--"}
        assert names <= {*flags.all_names(), *OWN.get(command, ())}, line
        if words and not words[0].startswith("-") and words[0] != "...":
            assert words[0].endswith(".yaml") or words[0] in recipe_names(), line


def test_there_are_commands_and_tables():
    found = [line for text in TEXTS.values() for line in COMMAND.findall("".join(blocks(text)))]
    assert len(found) > 20
    assert sum(len(TABLES.findall(text)) for text in TEXTS.values()) > 10


@pytest.mark.parametrize("page", [name for name in TEXTS if blocks(TEXTS[name], "yaml")])
def test_yaml_has_fields_that_there_are(page, tmp_path):
    for number, block in enumerate(blocks(TEXTS[page], "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        assert set(read_mapping(file)) <= set(flags.all_names())


@pytest.mark.parametrize("page", TEXTS)
def test_tables_of_fields_name_fields_that_there_are(page):
    for table in TABLES.findall(TEXTS[page]):
        for line in table.splitlines():
            names = re.findall(r"`(\w+)`", line.split("|")[1])
            assert set(names) <= set(flags.all_names()), line

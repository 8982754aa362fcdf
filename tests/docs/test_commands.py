"""Commands, YAML and tables of fields in README and docs/ name what there is."""

import re
import shlex
from pathlib import Path

import pytest

from gold_trainer import flags
from gold_trainer.__main__ import COMMANDS
from gold_trainer.config_file import read_mapping
from gold_trainer.recipes import recipe_names
from gold_trainer.speed import kinds

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

SCRIPT = re.compile(
    r"^(?:python|torchrun .*?) ((?:benchmarks|examples|docs|hub)/\w+\.py)(.*)$", re.MULTILINE
)
WORD = re.compile(r"\w+")
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


def test_every_field_is_on_a_page_beside_the_reference():
    pages = [text for name, text in TEXTS.items() if "reference/" not in name]
    said = {
        word
        for text in pages
        for span in re.findall(r"`[^`\n]+`", text)
        for word in WORD.findall(span)
    }
    said |= set(re.findall(r"^(\w+):", "\n".join(pages), re.MULTILINE))
    fields = {flag.name for _, group in flags.own_groups() for flag in group}
    assert len(fields) > 100 and fields - said == set()


@pytest.mark.parametrize("page", TEXTS)
def test_scripts_and_their_flags_are_there(page):
    for file, rest in SCRIPT.findall("".join(blocks(TEXTS[page]))):
        source = (ROOT / file).read_text(encoding="utf-8")
        for flag in re.findall(r"--[\w-]+", rest.partition("#")[0]):
            assert f'"{flag}"' in source, f"{file} {flag}"


def test_targets_of_make_that_pages_name_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    named = set()
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        text = page.read_text(encoding="utf-8")
        named |= set(re.findall(r"`make ([\w-]+)`", text))
        named |= set(re.findall(r"^make ([\w-]+)", "".join(blocks(text)), re.MULTILINE))
    assert len(named) > 5 and named <= targets


def test_models_that_can_be_packed_are_those_of_the_page():
    page = TEXTS["docs/speed.md"]
    for row, names in (("text", kinds.TEXT), ("pictures", kinds.PICTURES)):
        (cell,) = re.findall(rf"^\| {row} \| (.*) \|$", page, re.MULTILINE)
        assert sorted(re.findall(r"`(\w+)`", cell)) == sorted(names)

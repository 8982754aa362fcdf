"""Links, anchors, paths and quoted messages of README, docs/ and the notes lead somewhere; their
lines fit a page.
"""

import ast
import dataclasses
import re
from pathlib import Path

import pytest

import gold_kernels
import gold_trainer
from gold_kernels.losses import LOSSES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "NOTES.md",
    *sorted(DOCS.rglob("*.md")),
)
FENCE = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
# `trainer/window.py`, `gold_kernels/engine/`: a path of the repository
PATH = re.compile(r"`((?:gold_kernels|trainer|benchmarks|tests|docs|examples)/[\w./*-]*)`")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub and mkdocs give to headings; names that mkdocstrings documents."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
    return slugs | set(re.findall(r"^::: (\S+)", prose(page), re.MULTILINE))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{link} of {name_of(page)}"
        assert not anchor or anchor in anchors(target), f"{link} of {name_of(page)}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "CHANGELOG"], ids=name_of)
def test_paths_of_the_repository_exist(page):
    for path in PATH.findall(prose(page)):
        assert list(ROOT.glob(path.rstrip("/"))), f"{path} of {name_of(page)}"


def test_each_record_is_named_in_the_page_on_reproducing():
    page = (DOCS / "reproducing.md").read_text(encoding="utf-8")
    records = [path.name for path in (ROOT / "benchmarks" / "results").glob("*.csv")]
    assert len(records) > 10
    assert [name for name in records if f"`benchmarks/results/{name}`" not in page] == []


def test_commits_that_have_another_name_now_are_those_of_rows_of_the_records():
    page = (DOCS / "reproducing.md").read_text(encoding="utf-8")
    renamed = re.findall(r"^\| ([0-9a-f]{7}) \| [0-9a-f]{7} \|", page, re.MULTILINE)
    records = (ROOT / "benchmarks" / "results").glob("*.csv")
    rows = " ".join(path.read_text(encoding="utf-8") for path in records)
    assert renamed and [commit for commit in renamed if commit not in rows] == []


def test_each_picture_is_shown_on_a_page():
    shown = {(page.parent / link).resolve() for page in PAGES for link in LINK.findall(prose(page))}
    pictures = [*(ROOT / "benchmarks").rglob("*.png"), *DOCS.rglob("*.png")]
    assert len(pictures) > 5 and [path for path in pictures if path not in shown] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_prose_is_at_most_120_columns_wide_and_a_table_ends_with_an_empty_line(page):
    lines = prose(page).splitlines()
    rows = [line.lstrip().startswith("|") for line in lines]
    wide = [i for i, line in enumerate(lines) if len(line) > 120 and not rows[i]]
    assert [lines[i] for i in wide] == []
    behind = [lines[i + 1] for i in range(len(lines) - 1) if rows[i] and not rows[i + 1]]
    assert [line for line in behind if line] == [], "GitHub makes a row of it"


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert f": {page.relative_to(DOCS)}\n" in navigation, page


def test_quoted_code_is_that_of_the_sources():
    """Blocks of ```py are quoted, not run: they are parts of a source file, word for word."""
    sources = [p.read_text(encoding="utf-8") for p in (ROOT / "gold_kernels").rglob("*.py")]
    for page in PAGES:
        for block in re.findall(r"```py\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            assert any(block in source for source in sources), f"{block} of {name_of(page)}"


def messages() -> list[str]:
    """Literal strings of both packages, with ... for what is formatted in."""
    found = []
    for file in [*(ROOT / "gold_kernels").rglob("*.py"), *(ROOT / "trainer").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "..." for p in node.values)
                found.append("".join(parts))
    return found


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    quoted = re.findall(r"^### `(.*)`$", prose(DOCS / "troubleshooting.md"), re.MULTILINE)
    known = messages()
    assert len(quoted) >= 10
    for message in quoted:
        assert any(message in text for text in known), message


def test_the_reference_has_every_public_name():
    page = (DOCS / "reference" / "gold_kernels.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    names = {f"gold_kernels.{name}" for name in gold_kernels.__all__}
    assert len(names) > 10 and names <= shown
    losses = {f"{kind.__module__}.{kind.__qualname__}" for kind in LOSSES.values()}
    assert {name for name in losses if name.startswith("gold_kernels.")} <= shown
    for file in (ROOT / "gold_kernels" / "integrations").rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        own = [
            node.name
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith(("patch_", "register_"))
        ]
        assert {f"{module}.{name}" for name in own} <= shown


def test_the_reference_of_the_trainer_has_every_public_name():
    page = (DOCS / "reference" / "gold_trainer.md").read_text(encoding="utf-8")
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
    assert set(gold_trainer.__all__) <= shown


# "600 by default", "Off by default", "`error` (the default)", "its port, 8001"
DEFAULT = re.compile(r"([\w.]+) by default|`(\w+)` \(the default\)|, (\d[\d.]*)$")
SWITCHES = {"on": True, "off": False}


def test_defaults_in_tables_of_fields_are_those_of_the_config():
    fields = {field.name: field.default for field in dataclasses.fields(gold_trainer.GOLDConfig)}
    checked = []
    for page in DOCS.glob("*.md"):
        for name, cell in re.findall(r"^\| `(\w+)` \| (.*) \|$", prose(page), re.MULTILINE):
            said = DEFAULT.search(cell)
            if name not in fields or fields[name] is None or said is None:
                continue
            value = next(part for part in said.groups() if part)
            default = fields[name]
            kind = str if isinstance(default, str) else float
            actual = SWITCHES[value.lower()] if isinstance(default, bool) else kind(value)
            assert actual == default, f"{name} on {name_of(page)}"
            checked.append(name)
    assert len(checked) > 12 and {"lmbda", "on_bad_row", "padding_free"} <= set(checked)


def test_defaults_that_differ_from_trl_are_in_the_table_of_what_differs(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    theirs = pytest.importorskip("trl.experimental.gold").GOLDConfig
    ours = {field.name: field.default for field in dataclasses.fields(gold_trainer.GOLDConfig)}
    fields = [field for field in dataclasses.fields(theirs) if field.name in ours]
    other = {field.name for field in fields if ours[field.name] != field.default}
    other -= {field.name for field in fields if field.default is dataclasses.MISSING}
    page = (DOCS / "training.md").read_text(encoding="utf-8")
    table = page.partition("## What differs from TRL\n")[2]
    assert len(fields) > 100 and len(other) > 5
    assert [name for name in sorted(other) if f"`{name}`" not in table] == []

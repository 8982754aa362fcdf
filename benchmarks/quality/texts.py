"""Text that is at hand where Python is: docstrings of packages under permissive licences.

A docstring belongs to the part of its file: of twenty files, in the order of their names, one is
held out. So no file is both trained on and held out, and no docstring: one that is in several files
counts once. Needs no torch.
"""

import ast
import importlib.util
import os
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from platform import python_version

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# package -> its licence; python is the standard library
LICENCES = {
    "python": "PSF-2.0",
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "pandas": "BSD-3-Clause",
    "scikit-learn": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "matplotlib": "PSF-2.0 style",
}
MODULES = {"scikit-learn": "sklearn"}
PARTS = {"held_out": range(0, 1), "distil": range(1, 4), "teacher": range(4, 20)}  # of 20
FEWEST = 80  # characters of a docstring
END = "<|end|>"
MOST_OF_TOKENIZER = 4_000_000  # characters it is trained on
UNREAD = ("test", "tests", "site-packages", "idlelib", "__pycache__")


def version_of(package: str) -> str:
    return python_version() if package == "python" else version(package)


def files_of(package: str) -> list[Path]:
    """Its modules; none where it is not installed."""
    if package == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(MODULES.get(package, package))
        if spec is None or spec.origin is None:
            return []
        root = Path(spec.origin).parent
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - set(UNREAD))
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return found


def docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # a template, say
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text is not None and len(text) >= FEWEST]


def collect(
    packages: Sequence[str], most_files: int | None = None, workers: int = 1
) -> dict[str, list[str]]:
    """Texts of each part, of so many files of each package."""
    paths = list(chain(*(files_of(package)[:most_files] for package in packages)))
    if workers == 1:
        read = list(map(docstrings, paths))
    else:
        with ProcessPoolExecutor(workers) as pool:
            read = list(pool.map(docstrings, paths, chunksize=16))
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    seen: set[str] = set()
    for part in PARTS:  # what is held out first: a text that others have too is held out alone
        for place, found in enumerate(read):
            if place % 20 in PARTS[part]:
                parts[part] += (new := [text for text in dict.fromkeys(found) if text not in seen])
                seen.update(new)
    return parts


def sources(packages: Sequence[str]) -> str:
    """Packages that are here, with their versions."""
    return ", ".join(f"{name} {version_of(name)}" for name in packages if files_of(name))


def build_tokenizer(texts: Sequence[str], size: int) -> Tokenizer:
    """A byte-level BPE of every n-th text; token 0 ends one."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    every = 1 + sum(map(len, texts)) // MOST_OF_TOKENIZER
    bpe.train_from_iterator(texts[::every], trainer)
    return bpe


def tokenise(
    parts: dict[str, list[str]], tokenizer: Tokenizer, end: int, length: int
) -> dict[str, np.ndarray]:
    """part -> (rows, length) tokens, one text after the other; bytes_per_token of held-out text."""
    found: dict[str, np.ndarray] = {}
    for part, texts in parts.items():
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = np.array([i for e in encoded for i in (*e.ids, end)], np.int32)
        found[part] = ids[: len(ids) // length * length].reshape(-1, length)
        if part == "held_out":
            size_of_all = sum(len(text.encode()) for text in texts)
            found["bytes_per_token"] = np.array(size_of_all / max(1, len(ids)))
    return found

"""Which files of a folder have the rows of a split: none of them is passed over in silence."""

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from datasets.data_files import SPLIT_KEYWORDS

from gold_trainer.data.json_files import JSON_SUFFIXES

logger = logging.getLogger(__name__)

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow", ".tar": "webdataset"}
SAVED = ("dataset_dict.json", "state.json")  # by save_to_disk
METADATA = tuple(f"metadata{suffix}" for suffix in (".jsonl", ".csv", ".parquet"))  # of pictures
NO_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")


def json_file_of(folder: Path, split: str) -> Path | None:
    """SPLIT.json or SPLIT.jsonl; None: datasets finds the files. ValueError for several of which
    one alone would be read, a warning for others that go by the split's name.
    """
    if any((folder / name).exists() for name in SAVED):
        return None
    if any((folder / name).exists() for name in METADATA):
        files = (folder / f"{split}{suffix}" for suffix in JSON_SUFFIXES)
        return next((file for file in files if file.is_file()), None)
    named = _named(folder, split)
    own = [path for path in named if path.parent == folder and path.stem == split]
    is_json = bool(own) and all(path.suffix in JSON_SUFFIXES for path in own)
    if len(own) > 1 or (not is_json and _has_several_kinds(named)):
        raise ValueError(
            f"dataset {folder}: the rows of split {split!r} must be in files of one kind, got "
            f"{_listed(named, folder)}; keep some of them, or give the path of one"
        )
    others = [path for path in named if path not in own]
    if is_json and others:
        logger.warning(
            "dataset %s: split %r is read from %s alone, and not from %s.",
            *(folder, split, own[0].name, _listed(others, folder)),
        )
    if not named and _has_several_kinds(there := _named(folder, "")):
        logger.warning(
            "dataset %s: split %r is read from files of one kind, and not from all of %s.",
            *(folder, split, _listed(there, folder)),
        )
    return own[0] if is_json else None


def files_of_one_kind(folder: Path, splits: Sequence[str]) -> dict[str, list[Path]] | None:
    """The files of each split, without regard to pictures that lie beside them; None where they are
    of several kinds, or where there are none. Files without a split's name are those of train.
    """
    keywords = {str(split): names for split, names in SPLIT_KEYWORDS.items()}  # dev is validation
    files = {
        split: _named(folder, split) or _named(folder, *keywords.get(split, ())) for split in splits
    }
    if list(splits) == ["train"] and not files["train"]:
        others = [name for of, names in keywords.items() if of != "train" for name in names]
        not_of_train = set(_named(folder, *others))
        files["train"] = [path for path in _named(folder, "") if path not in not_of_train]
    found = [path for paths in files.values() for path in paths]
    of_pictures = any(path.name in METADATA for path in found)
    is_clear = all(files.values()) and not of_pictures and not _has_several_kinds(found)
    return files if is_clear else None


def _named(folder: Path, *splits: str) -> list[Path]:
    """Files that datasets would read for these splits: train.jsonl, train-00000.jsonl,
    train/a.jsonl; for "" all.
    """
    if not splits:
        return []
    names_of_splits = "|".join(map(re.escape, splits))
    is_of_split = re.compile(rf"(^|[-._ /\d])({names_of_splits})([-._ /\d]|$)")
    suffixes = (*JSON_SUFFIXES, *BUILDERS)
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            if name.startswith(".") or not name.endswith(suffixes):  # pictures are many
                continue
            if name in NO_ROWS:
                continue
            path = Path(parent, name)
            place = path.relative_to(folder).with_suffix("").as_posix()
            if splits == ("",) or is_of_split.search(place):
                found.append(path)
    return sorted(found)


def _has_several_kinds(paths: Sequence[Path]) -> bool:
    return len({BUILDERS.get(path.suffix, "json") for path in paths}) > 1


def _listed(paths: Sequence[Path], folder: Path, limit: int = 4) -> str:
    names = [path.relative_to(folder).as_posix() for path in paths]
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest

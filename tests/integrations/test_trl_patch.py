"""Replacing functions of trl: all or none, once, and back."""

import dataclasses
from pathlib import Path

import pytest
import torch
import trl
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.gold import GOLDConfig as TRLConfig
from trl.experimental.gold.gold_trainer import GOLDTrainer, ULDLoss
from trl.trainer import distillation_trainer

from gold_kernels.integrations.trl import VERSIONS, patch_trl, undo
from gold_trainer import GOLDConfig

TARGETS = [
    (distillation_trainer, "_chunked_divergence_loss"),
    (GKDTrainer, "generalized_jsd_loss"),
    (GKDTrainer, "compute_loss"),
    (GOLDTrainer, "generalized_jsd_loss"),
    (GOLDTrainer, "compute_loss"),
    (ULDLoss, "__call__"),
]


def found():
    return [vars(owner)[name] for owner, name in TARGETS]


@pytest.fixture(autouse=True)
def _unpatched():
    before = found()
    yield
    undo()
    assert all(now is then for now, then in zip(found(), before, strict=True))


def test_all_are_replaced_and_undo_restores_the_very_objects():
    before = found()
    patch = patch_trl()
    assert not any(now is then for now, then in zip(found(), before, strict=True))
    patch.undo()
    assert all(now is then for now, then in zip(found(), before, strict=True))
    patch.undo()  # changes nothing
    undo_it = patch_trl()
    undo_it()
    assert all(now is then for now, then in zip(found(), before, strict=True))


def test_second_patch_is_the_first():
    first = patch_trl(chunk_size=7)
    after = found()
    assert patch_trl(chunk_size=7) is first
    assert all(now is then for now, then in zip(found(), after, strict=True))
    with pytest.raises(ValueError, match=r"one set of options .* got {} .*chunk_size.* undo\(\)"):
        patch_trl()
    undo()
    assert not first.is_active


def test_with_block_ends_the_patch_after_an_error_too():
    before = found()
    with pytest.raises(RuntimeError), patch_trl():
        raise RuntimeError
    assert all(now is then for now, then in zip(found(), before, strict=True))


def test_what_was_put_on_top_of_a_patch_stays_with_a_warning():
    before = vars(distillation_trainer)["_chunked_divergence_loss"]
    patch = patch_trl()
    of_the_user = object()
    distillation_trainer._chunked_divergence_loss = of_the_user
    with pytest.warns(UserWarning, match="_chunked_divergence_loss was replaced after the patch"):
        patch.undo()
    assert distillation_trainer._chunked_divergence_loss is of_the_user
    distillation_trainer._chunked_divergence_loss = before


@pytest.mark.parametrize("version", ["1.15.0", "1.17.0", "2.0.0.dev0"])
def test_another_version_is_refused_by_name(version, monkeypatch):
    before = found()
    monkeypatch.setattr(trl, "__version__", version)
    message = f"patch_trl: trl {VERSIONS[-1]} is expected, got trl {version}; pip install"
    with pytest.raises(ValueError, match=message):
        patch_trl()
    assert all(now is then for now, then in zip(found(), before, strict=True))


@pytest.mark.parametrize(
    ("owner", "name"), TARGETS, ids=lambda value: getattr(value, "__name__", value)
)
def test_another_signature_is_refused_by_name_and_nothing_is_replaced(owner, name, monkeypatch):
    other = staticmethod(lambda logits, weight=1.0: logits)
    with monkeypatch.context() as context:
        context.setattr(owner, name, other)
        before = found()
        with pytest.raises(
            ValueError, match=rf"{name} must take \(.+\), got \(logits, weight=1.0\)"
        ):
            patch_trl()
        assert all(now is then for now, then in zip(found(), before, strict=True))


def test_a_missing_function_is_refused_by_name(monkeypatch):
    with monkeypatch.context() as context:
        context.delattr(distillation_trainer, "_chunked_divergence_loss")
        with pytest.raises(ValueError, match="_chunked_divergence_loss is expected, got none"):
            patch_trl()


def test_another_option_is_refused_by_name():
    with pytest.raises(ValueError, match=r"got chunksize=; did you mean chunk_size\?"):
        patch_trl(chunksize=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": True}, "patch_trl: chunk_size must be a whole number of rows"),
        ({"budget_bytes": "1GB"}, "patch_trl: budget_bytes must be at least 1"),
        ({"logits_dtype": torch.float16}, "patch_trl: logits_dtype must be None"),
        ({"backend": "cuda"}, "patch_trl: backend must be None, 'triton' or 'torch'"),
    ],
)
def test_options_that_no_loss_takes_are_refused_before_a_run(options, message):
    before = vars(GOLDTrainer)["generalized_jsd_loss"]
    with pytest.raises(ValueError, match=message):
        patch_trl(**options)
    assert vars(GOLDTrainer)["generalized_jsd_loss"] is before


def test_the_page_on_training_names_each_default_that_differs_from_trl():
    theirs, ours = (
        {field.name: field for field in dataclasses.fields(config)}
        for config in (TRLConfig, GOLDConfig)
    )
    differ = {
        name
        for name in theirs.keys() & ours.keys()
        if name != "remove_unused_columns"  # must stay False here
        and (theirs[name].default, theirs[name].default_factory)
        != (ours[name].default, ours[name].default_factory)
    }
    assert {"max_length", "uld_token_merge_strategy"} <= differ
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.partition("## What differs from TRL\n")[2].partition("\n## ")[0]
    assert [name for name in sorted(differ) if f"`{name}`" not in section] == []

"""Folders that several files of tests begin with."""

import logging
import shutil

import pytest
import torch

from gold_trainer.speed import compiling
from gold_trainer.writers import local
from support.cache_cases import Pair, save_pair
from support.served_stub import served_teacher
from support.tiny_models import tiny
from support.vllm_stub import stub_server


@pytest.fixture
def output_dir(tmp_path):
    """A folder that is not there, and must not be there after the error."""
    folder = tmp_path / "run"
    yield folder
    assert not folder.exists(), "something was written"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Pair:
    """A pair of models with a cache of several shards."""
    pair = save_pair(tmp_path_factory.mktemp("pair"), "qwen3")
    pair.cache("cache", "--cache_shard_mib=0.001")
    return pair


@pytest.fixture
def pair(made, tmp_path) -> Pair:
    """A copy of it that a test may spoil."""
    shutil.copytree(made.folder, tmp_path / "pair")
    return made._replace(folder=tmp_path / "pair")


@pytest.fixture
def serve(tmp_path):
    """A pair's teacher behind a stub."""

    def of(pair, family, **options):
        model, processor = tiny(family, "teacher", **options)
        return served_teacher(model, processor, pair.folder / "teacher", tmp_path / "states")

    return of


@pytest.fixture
def stub():
    """A server that answers as vLLM does."""
    with stub_server() as stub:
        yield stub


@pytest.fixture
def graphs(monkeypatch):
    """Those that a backend which compiles nothing has seen."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, examples):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(local, "COMPILER", backend)
    monkeypatch.setattr(compiling, "BACKEND", backend)
    # pytest listens to all that is logged: torch would write every graph down
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    yield seen
    torch._dynamo.reset()

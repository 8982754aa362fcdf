"""Rollouts of a vLLM engine in the training process, as far as that goes without a GPU."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from gold_trainer import ranks, sampling_check
from gold_trainer.writers.vllm import check as vllm_check
from gold_trainer.writers.vllm import sync as vllm_sync
from support.forks import TESTS
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer
from support.vllm_cases import prompts_of
from support.vllm_server import ENVIRONMENT, PYTHON, ROOT, assert_installed

SECONDS = 300
COLOCATE = {"use_vllm": True, "vllm_mode": "colocate", "lmbda": 1.0}


def test_an_engine_in_the_process_writes_with_the_students_weights(tmp_path):
    assert_installed()
    links = tmp_path / "links"
    links.mkdir()
    (links / "gold_trainer").symlink_to(ROOT / "trainer")
    paths = os.pathsep.join(map(str, (ROOT, links, TESTS)))
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": paths, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [PYTHON, "-m", "support.vllm_colocate_step", tmp_path],
        env=environment,
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["log"]) == 3
    for entry in result["log"]:
        assert entry[f"{sampling_check.NAME}/max"] < 1e-4 and entry["rollout_age"] == 0
    written = [ours for ours, _ in result["greedy"]]
    assert written == [theirs for _, theirs in result["greedy"]]
    assert written[0] == written[2] != written[1]


def test_a_missing_package_is_told_before_models_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_check, "find_spec", lambda name: None)
    fields = {"use_vllm": True, "vllm_mode": "colocate", "lmbda": 1.0}
    with pytest.raises(ValueError, match=r"needs the package vllm here, got none; pip install"):
        make_trainer(tmp_path, tiny_rows(4), "qwen3", **fields)


def test_an_old_package_is_told_before_models_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_check, "find_spec", lambda name: True)
    monkeypatch.setattr(vllm_check, "version", lambda name: "0.9.1")
    with pytest.raises(ValueError, match=r"needs vllm 0.32 or newer here, got 0.9.1; pip install"):
        make_trainer(tmp_path, tiny_rows(4), "qwen3", **COLOCATE)


class FakeEngine:
    """Remembers its calls, and says 5 6 7 to everything."""

    def __init__(self, **options):
        self.options, self.calls, self.llm_engine, self.broken = options, [], self, ""
        self.model_config = SimpleNamespace(max_model_len=options["max_model_len"] or 30)

    def __getattr__(self, name):
        return lambda **options: self.note(name, options.get("level"))

    def note(self, name, value):
        if name == self.broken:
            raise RuntimeError(f"no memory in {name}")
        self.calls.append((name, value))

    def collective_rpc(self, name, kwargs):
        self.note(name, len(kwargs["weights_iterator"]))

    def generate(self, prompts, params, use_tqdm):
        said = [(5, 6, 7), [{5: Said(-1.0)}, {6: Said(-1.0)}, {7: Said(-1.0)}]]
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[SimpleNamespace(token_ids=said[0], logprobs=said[1])] * given["n"],
            )
            for prompt, given in zip(prompts, params, strict=True)
        ]


class Said(NamedTuple):
    logprob: float


@pytest.fixture
def package(monkeypatch):
    made = SimpleNamespace(SamplingParams=dict, LLM=FakeEngine)
    monkeypatch.setitem(sys.modules, "vllm", made)
    monkeypatch.setattr(vllm_check, "find_spec", lambda name: True)
    monkeypatch.setattr(vllm_check, "version", lambda name: "0.32.0")


def test_what_the_engine_would_cut_in_silence_is_refused(package, tmp_path):
    fields = COLOCATE | {"max_length": None, "max_completion_length": 25}
    run = make_trainer(tmp_path, tiny_rows(4), "qwen3", **fields)
    with pytest.raises(ValueError, match=r"^row 0: .* --max-model-len 30, got .*; set max_len"):
        run.train()


def test_an_error_of_one_rank_is_told_to_all(package, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(ranks, "raise_on_all", told.append)
    run = make_trainer(tmp_path, tiny_rows(4), "qwen3", **COLOCATE)
    writer = run.rollouts.writers["student"]
    writer.sync_weights(run.model, 0)
    prompt = prompts_of(run)[0]
    prompt.example.videos = [object()]
    writer.complete([prompt], run.rollouts.sampling["student"])
    assert "text and pictures, got 1 videos" in str(told[-1])


@pytest.mark.parametrize("name", ["reload_weights", "reset_mm_cache", "wake_up", "sleep"])
def test_an_engine_that_fails_on_one_rank_is_told_to_all(name, package, tmp_path, monkeypatch):
    """Whatever it was doing: the other ranks are on their way to the next step."""
    run = make_trainer(tmp_path, tiny_rows(4), "qwen3", vllm_enable_sleep_mode=True, **COLOCATE)
    writer, sampling = run.rollouts.writers["student"], run.rollouts.sampling["student"]
    writer.sync_weights(run.model, 0)
    writer.complete([], sampling)
    told = []
    monkeypatch.setattr(ranks, "raise_on_all", told.append)
    writer.engine.broken = name
    writer.sync_weights(run.model, 1)
    writer.complete(prompts_of(run)[:1], sampling)
    assert [str(error) for error in told if error is not None] == [f"no memory in {name}"]


def test_an_engine_without_prompts_sleeps_too(package, tmp_path):
    run = make_trainer(tmp_path, tiny_rows(4), "qwen3", vllm_enable_sleep_mode=True, **COLOCATE)
    run.rollouts.complete([run.objective.collator.blank(0)], 0)
    assert run.rollouts.writers["student"].engine.calls[-1] == ("sleep", 2)


def test_weights_that_have_no_room_are_told_with_what_can_be_set(package, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_sync.shutil, "disk_usage", lambda root: SimpleNamespace(free=1000))
    run = make_trainer(tmp_path, tiny_rows(4), "qwen3", **COLOCATE)
    with pytest.raises(ValueError, match=r"room for \d+ MiB of weights, .*; set TMPDIR to"):
        run.train()


@pytest.mark.parametrize(("frequency", "level"), [(1, 2), (2, 1)])
def test_an_engine_sleeps_while_the_student_learns(frequency, level, package, tmp_path):
    """Deeply, without its weights, where the next window brings new ones anyway."""
    fields = {"use_vllm": True, "vllm_mode": "colocate", "lmbda": 1.0, "max_steps": 3}
    own = {"vllm_enable_sleep_mode": True, "vllm_sync_frequency": frequency}
    run = make_trainer(tmp_path, tiny_rows(4), "qwen3", **fields, **own)
    run.train()
    engine = run.rollouts.writers["student"].engine
    assert engine.options["enable_sleep_mode"] and engine.options["max_model_len"] == 256
    num_weights = len(run.model.state_dict()) - 1  # a tied head
    resets = [(f"reset_{name}_cache", None) for name in ("prefix", "mm", "encoder")]
    reload = [("reload_weights", num_weights), *resets]
    asleep, awake = ("sleep", level), ("wake_up", None)
    again = [] if frequency == 2 else reload
    assert engine.calls == [asleep, awake, *again, asleep, awake, *reload, asleep]


def test_a_second_run_of_a_trainer_gives_the_engine_its_own_weights(package, tmp_path):
    fields = COLOCATE | {"max_steps": 2, "vllm_sync_frequency": 2}
    run = make_trainer(tmp_path, tiny_rows(4), "qwen3", **fields)
    run.train()
    engine = run.rollouts.writers["student"].engine
    assert not engine.calls, "it was made with the weights"
    run.train()
    assert engine.calls[0][0] == "reload_weights"

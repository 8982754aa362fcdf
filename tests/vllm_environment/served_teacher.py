"""A tiny teacher behind vLLM's own servers, on a CPU. Not among the tests, as it takes servers of
its own, half a minute each: vLLM refuses options of the rollouts' server beside hidden states.

    make served-teacher
"""

import json
from pathlib import Path

import pytest

from gold_trainer import GOLDConfig
from gold_trainer.teachers.served.start_line import server_options
from support.tiny_models import save_tiny, tiny, tiny_processor
from support.trainer_cases import (
    FIELDS,
    GradientRecorder,
    assert_equal_gradients,
    losses_of,
    make_trainer,
)
from support.vllm_cases import ROWS
from support.vllm_server import free_port, running_command

CONNECTOR = {
    "kv_connector": "CPUHiddenStatesConnector",
    "kv_connector_module_path": "cpu_connector",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model = save_tiny(folder / "model", "qwen3_vl", "teacher", seed=1)
    url = f"http://127.0.0.1:{free_port()}"
    config = GOLDConfig(output_dir=str(folder), teacher_model_server_url=url, **FIELDS)
    options = server_options(config, str(model))
    transfer = json.loads(options[-1]) | CONNECTOR
    transfer["kv_connector_extra_config"]["shared_storage_path"] = str(folder / "states")
    options[-1] = json.dumps(transfer)
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    with running_command(model, folder, [*options, "--dtype", "float32"], path) as running:
        yield running


@pytest.fixture(scope="module")
def of_tokens(tmp_path_factory):
    """Asked for prompt_logprobs: with no other options than its start line has."""
    folder = tmp_path_factory.mktemp("of_tokens")
    model = save_tiny(folder / "model", "qwen3_vl", "teacher", seed=1)
    url = f"http://127.0.0.1:{free_port()}"
    fields = FIELDS | {"teacher_model_server_url": url, "loss_top_k": 24}
    options = server_options(GOLDConfig(output_dir=str(folder), **fields), str(model))
    with running_command(model, folder, [*options, "--dtype", "float32"], {}) as running:
        yield running


def run_of(teacher, output_dir, **fields):
    recorder = GradientRecorder()
    trainer = make_trainer(
        output_dir,
        ROWS,
        teacher=teacher,
        processor=tiny_processor("qwen3_vl"),
        callbacks=[recorder],
        max_steps=4,
        **fields,
    )
    trainer.train()
    return losses_of(trainer), recorder.steps


def test_a_run_learns_what_it_does_of_a_teacher_that_is_here(server, tmp_path):
    """Rows with none, one and two pictures, in two epochs: the second finds prefixes cached."""
    live, live_steps = run_of(tiny("qwen3_vl", "teacher", seed=1)[0], tmp_path / "live")
    losses, steps = run_of(server.url, tmp_path / "served")
    assert losses == pytest.approx(live, rel=1e-5)
    for ours, theirs in zip(steps, live_steps, strict=True):
        assert_equal_gradients(ours, theirs, 1e-4)


def test_its_likeliest_tokens_are_those_of_a_teacher_that_is_here(of_tokens, tmp_path):
    fields = {"loss_top_k": 24, "loss_temperature": 0.8, "loss_teacher_temperature": 1.0}
    live, live_steps = run_of(tiny("qwen3_vl", "teacher", seed=1)[0], tmp_path / "live", **fields)
    losses, steps = run_of(of_tokens.url, tmp_path / "served", **fields)
    assert losses == pytest.approx(live, rel=1e-5)
    for ours, theirs in zip(steps, live_steps, strict=True):
        assert_equal_gradients(ours, theirs, 1e-4)
    with pytest.raises(ValueError, match="prompt_logprobs of loss_top_k=25 tokens, got a refusal"):
        run_of(of_tokens.url, tmp_path / "more", **fields | {"loss_top_k": 25})


def test_another_checkpoint_is_refused(server, tmp_path):
    other = save_tiny(tmp_path / "model", "qwen3_vl", "teacher", seed=2)
    with pytest.raises(ValueError, match=r"must run .*model and keep what its last layer makes"):
        run_of(str(other), tmp_path, teacher_model_server_url=server.url)

"""push_to_hub: without network or login no run begins; a push that fails keeps the student."""

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import AutoModelForCausalLM

from gold_trainer import loading
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer

ROWS = tiny_rows(4)


def answer(monkeypatch, **answers):
    for name, given in answers.items():

        def call(self, *args, given=given, **kwargs):
            if isinstance(given, Exception):
                raise given
            return given

        monkeypatch.setattr(huggingface_hub.HfApi, name, call)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (OfflineModeIsEnabled("offline mode is enabled."), "OfflineModeIsEnabled"),
        (LocalTokenNotFoundError("Token is required"), "LocalTokenNotFoundError"),
        (ConnectionError("no route"), "ConnectionError: no route"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_run_that_could_not_push_is_refused_before_models_are_loaded(
    error, name, tmp_path, monkeypatch
):
    answer(monkeypatch, whoami=error)
    monkeypatch.setattr(loading, "load_student", lambda *args: pytest.fail("models are loaded"))
    with pytest.raises(
        ValueError, match=f"push_to_hub needs the hub and a login, got {name}.*hub_"
    ):
        make_trainer(tmp_path, ROWS, "qwen3", push_to_hub=True)


def test_nobody_is_asked_without_push_to_hub(tmp_path, monkeypatch):
    answer(monkeypatch, whoami=RuntimeError("asked"))
    make_trainer(tmp_path, ROWS, "qwen3")


def test_a_push_that_fails_keeps_the_student_and_says_where(tmp_path, monkeypatch):
    repository = huggingface_hub.RepoUrl("https://huggingface.co/someone/student")
    refused = ConnectionError("the hub is gone.")
    answer(monkeypatch, whoami={"name": "a"}, create_repo=repository, upload_folder=refused)
    trainer = make_trainer(tmp_path, ROWS, "qwen3", push_to_hub=True)
    trainer.train()
    message = f"got ConnectionError: the hub is gone; it is saved in {tmp_path}: `hf upload"
    with pytest.raises(ValueError, match=message):
        trainer.save_model()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(saved[name].equal(weight) for name, weight in trainer.model.state_dict().items())
    assert (tmp_path / "README.md").is_file()

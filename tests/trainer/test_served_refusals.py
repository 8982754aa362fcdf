"""What a served teacher is refused for, and what a run does when its server fails: one sentence
each, with the address.
"""

import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from gold_trainer import GOLDConfig
from gold_trainer.batches import SideInputs
from gold_trainer.data.rows import Row
from gold_trainer.preparing import prepare
from gold_trainer.teachers import make_teacher, source_of
from gold_trainer.teachers.served import client
from gold_trainer.teachers.served.check import Served, warn_of_another
from gold_trainer.teachers.served.tail import read_tail
from gold_trainer.writers.vllm.requests import GENERATE
from gold_trainer.writers.vllm.server import Server
from support.cache_cases import save_pair
from support.served_stub import served_teacher
from support.tiny_models import save_tiny, tiny
from support.trainer_cases import FIELDS
from support.vllm_stub import late

URL = r"the vLLM server at http://127\.0\.0\.1:\d+ must "
STARTED = r"start it with: vllm serve .*extract_hidden_states"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), "qwen3", count=2)


@pytest.fixture
def served(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.0)
    model, processor = tiny("qwen3", "teacher")
    with served_teacher(model, processor, pair.folder / "teacher", tmp_path / "states") as running:
        yield running


def opened(pair, served, **fields):
    """The teacher as a run has it before its first step, and two examples."""
    student = str(pair.folder / "student")
    given = {"teacher_model_name_or_path": str(pair.folder / "teacher"), **served.fields, **fields}
    args = GOLDConfig(output_dir=str(pair.folder / "run"), **(FIELDS | given))
    prepared = prepare(student, source_of(None, args), args)
    name = args.teacher_model_name_or_path
    teacher = make_teacher(name, None, prepared.teacher_processor, args)
    rows = [Row(0, "one", " two three", []), Row(1, "4", " 5", [])]
    return teacher, teacher.side.collator(rows).examples


def asked(pair, served, **fields):
    teacher, examples = opened(pair, served, **fields)
    return lambda: teacher.hidden_rows(SideInputs.without_tensors(examples))


def refuse(text):
    return pytest.raises((ValueError, OSError), match=text)


def one_sentence(error):
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "answer", "text"),
    [
        (
            "/version",
            {"version": "0.31.2"},
            URL + r"be of version 0\.32 or newer, got 0\.31\.2",
        ),
        (GENERATE, 404, URL + "have /inference/v1/generate, got 404; .* --enable-scale-out: start"),
        (
            "/tokenize",
            {"tokens": [1, 2]},
            URL + r"have the tokenizer of the rows, got 2 tokens for \d+ .*; serve .*teacher, or",
        ),
    ],
)
def test_a_server_of_another_kind_is_refused(path, answer, text, pair, served):
    served.stub.answers[path] = answer
    with refuse(text) as error:
        opened(pair, served)
    one_sentence(error)


def test_another_template_is_refused(pair, served):
    tokenize = served.tokenize
    served.stub.answers["/tokenize"] = lambda body: (
        {"tokens": [7]} if "messages" in body else tokenize(body)
    )
    with refuse(URL + r"have the chat template of .*teacher, got another, 1 tokens .*" + STARTED):
        opened(pair, served)


def test_sequences_that_do_not_fit_are_refused_before_the_run(pair, served):
    served.entry["max_model_len"] = 255
    with refuse(URL + r"take sequences of max_length=256 tokens, got --max-model-len 255; lower"):
        opened(pair, served)


def test_another_layer_or_checkpoint_is_refused(pair, served):
    served.layer -= 1
    with refuse(
        URL + r"run .*teacher and keep what its last layer makes, got the log-prob.*" + STARTED
    ):
        opened(pair, served)
    served.model, served.layer = tiny("qwen3", "teacher", seed=9)[0], served.layer + 1
    with refuse(URL + "run .*teacher and keep what its last layer makes, got the log-probability"):
        opened(pair, served)
    served.model = tiny("qwen3")[0]
    served.layer = served.model.config.num_hidden_layers
    with refuse(
        URL + r"keep hidden states of its last layer, of shape \(\d+, 1, 128\) .*, 1, 64\);"
    ):
        opened(pair, served)


def test_another_name_of_the_checkpoint_is_told(pair, served, caplog):
    served.entry["root"] = "Qwen/Qwen3-8B"
    with caplog.at_level(logging.WARNING):
        opened(pair, served)
    assert f"at {served.stub.url} was started with Qwen/Qwen3-8B, and teacher_model" in caplog.text
    assert caplog.text.count("was started with") == 1


def test_a_folder_that_the_server_has_of_an_id_of_the_hub_is_told(tmp_path, caplog):
    server, served = Server("http://127.0.0.1:1", 1.0, ""), Served("teacher", str(tmp_path), 8)
    with caplog.at_level(logging.WARNING):
        warn_of_another(server, served, "Qwen/Qwen3-8B")
        warn_of_another(server, served, str(tmp_path))
    assert caplog.text.count("was started with") == 1
    assert f"{tmp_path}, and teacher_model_name_or_path is Qwen/Qwen3-8B: norm" in caplog.text


def test_a_server_without_hidden_states_is_refused(pair, served):
    generate = served.generate

    def plain(body):
        answer = generate(body)
        return answer | {"kv_transfer_params": None} if isinstance(answer, dict) else answer

    served.stub.answers[GENERATE] = plain
    with refuse(URL + r"keep hidden states, got an answer that names no file of them; " + STARTED):
        opened(pair, served)


def test_files_that_are_not_here_or_have_more_layers_are_refused(pair, served):
    served.num_layers_kept = 2
    with refuse(URL + r"keep hidden states of its last layer, .*, got those of shape \(\d+, 2, \d"):
        opened(pair, served)
    served.num_layers_kept = 1
    generate = served.generate

    def elsewhere(body):
        answer = generate(body)
        if isinstance(answer, dict):
            answer["kv_transfer_params"] = {"hidden_states_path": "/nowhere/1.safetensors"}
        return answer

    served.stub.answers[GENERATE] = elsewhere
    text = r"write hidden states where this process reads them, got /nowhere/1.*FileNotFoundError"
    with refuse(URL + text + ".*run both on one machine, or share its folder") as error:
        opened(pair, served)
    one_sentence(error)


def test_a_file_that_is_broken_is_refused(pair, served, tmp_path):
    generate, file = served.generate, tmp_path / "broken.safetensors"

    def broken(body):
        answer = generate(body)
        if isinstance(answer, dict) and "kv_transfer_params" in answer:
            file.write_bytes(b"no header")
            client._lock_of(file).touch()
            answer["kv_transfer_params"] = {"hidden_states_path": str(file)}
        return answer

    served.stub.answers[GENERATE] = broken
    with refuse(URL + r"write whole files, got .*broken\.safetensors \(") as error:
        opened(pair, served)
    one_sentence(error)


def test_a_file_that_lacks_rows_or_tensors_is_refused(pair, served):
    """Of every row, and not of the first alone."""
    ask, whole = asked(pair, served), served.tensors
    served.tensors = lambda hidden, ids: whole(hidden[:-1], ids)
    with refuse(
        URL + r"keep hidden states of its last layer, .* of \d+ tokens .* shape \(\d+, 1, "
    ):
        ask()
    served.tensors = lambda hidden, ids: {"token_ids": ids}
    with refuse(URL + "keep hidden states of its last layer, .*, got none; " + STARTED):
        ask()


@pytest.mark.parametrize(
    ("path", "answer", "what"),
    [
        ("/version", {}, "its version, got {}"),
        ("/v1/models", {}, "a model, its root and its max_model_len, got {}"),
        ("/v1/models", {"data": []}, "a model, its root and its max_model_len, got "),
        ("/v1/models", {"data": [{"id": "m"}]}, "a model, its root and its max_model_len, got "),
        (
            "/v1/models",
            {"data": [{"id": "m", "root": None, "max_model_len": None}]},
            "a model, its root and its max_model_len, got ",
        ),
        ("/tokenize", {}, "tokens, got {}"),
        (GENERATE, {"x": 1}, "token ids, a choice and its log-probability, got {'x': 1}"),
        (GENERATE, {"choices": []}, "token ids, a choice and its log-probability, got "),
    ],
)
def test_answers_that_are_no_vllms_are_refused_with_the_address(path, answer, what, pair, served):
    served.stub.answers[path] = answer
    with refuse(URL + re.escape(f"answer {path} with {what}")) as error:
        opened(pair, served)
    one_sentence(error)
    assert "without what stands before it, started with: vllm serve" in str(error.value)


@pytest.mark.parametrize("path", ["/version", "/v1/models", "/tokenize", GENERATE])
@pytest.mark.parametrize(
    ("status", "text"),
    [
        (400, "(answer|turn|take) .*, got a refusal .refused with 400.; "),
        (401, "take requests without a key, got 401 of .*; start it without --api-key"),
        (404, "(expected at .*, got 404 of .*, which vLLM always has; start one|--enable-scale)"),
        (429, "answer .*, got 429: refused with 429; "),
    ],
)
def test_a_refusal_of_the_first_requests_names_the_address(status, text, path, pair, served):
    generate = served.generate
    # an empty body asks whether the path is there
    served.stub.answers[path] = lambda body: (
        generate(body) if path == GENERATE and not body and status != 404 else status
    )
    with refuse(f"(must|is) .*{text}") as error:
        opened(pair, served, teacher_request_retries=0)
    one_sentence(error)
    assert served.stub.url in str(error.value) and "vllm serve" in str(error.value)


def test_a_version_of_a_build_from_source_is_told(pair, served, caplog):
    served.stub.answers["/version"] = {"version": "dev"}
    with caplog.at_level(logging.WARNING):
        opened(pair, served)
    assert f"at {served.stub.url} is of version 'dev', which cannot be compared" in caplog.text


def test_a_server_that_fails_is_asked_again(pair, served, caplog):
    expected = asked(pair, served)()
    ask = asked(pair, served, teacher_request_retries=2)
    generate, failures = served.generate, [503, 0]  # 0: the connection is closed
    served.stub.answers[GENERATE] = lambda body: failures.pop() if failures else generate(body)
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(ask(), expected)
    assert not failures
    assert len([r for r in caplog.records if "; asking again, " in r.getMessage()]) == 2
    failures += [500] * 9
    with refuse(URL + f"answer {GENERATE}, got 500: .*ended or failed, .*again with: vllm") as e:
        ask()
    one_sentence(e)
    assert len(failures) >= 3, "each of two rows is asked for three times at most"


def test_a_server_that_is_late_ends_the_run(pair, served):
    ask = asked(pair, served, teacher_request_timeout=0.2)
    generate = served.generate
    served.stub.answers[GENERATE] = late(0.5)
    with refuse(URL + r"answer .* within 0\.2 s \(teacher_request_timeout\), got nothing; raise"):
        ask()
    assert len(served.rows) == 2, "what it is slow with is not sent once more"
    served.stub.answers[GENERATE], served.is_held = generate, True
    with refuse(URL + r"write .*safetensors within 0\.2 s \(teacher_request_timeout\), got a file"):
        ask()


def test_a_server_that_is_not_there_is_waited_for(pair, served):
    served.stub.answers["/health"] = 503
    with refuse(r"a vLLM server is expected at .*503 within 0 s \(teacher_server_timeout\); start"):
        opened(pair, served, teacher_server_timeout=0)


def test_a_row_that_the_server_sees_otherwise_or_refuses_is_named(pair, served):
    ask = asked(pair, served)
    inputs = served._inputs  # of the model
    served._inputs = lambda body: ([*inputs(body)[0], 5], {})
    with refuse(r"^row 0: the vLLM server must see the prompt that the teacher is shown, got \d+"):
        ask()
    served.stub.answers[GENERATE] = 400
    with refuse(r"^row 0: " + URL + r"take the row, got a refusal \(refused with 400\) of \d+"):
        ask()


def test_a_checkpoint_without_safetensors_is_refused(pair, served, monkeypatch):
    file = pair.folder / "teacher" / "model.safetensors"
    file.rename(file.with_suffix(".bin"))
    try:
        with pytest.raises(ValueError, match=r"must have safetensors files, .*teacher' without;"):
            opened(pair, served)
    finally:
        file.with_suffix(".bin").rename(file)


def test_a_checkpoint_without_a_norm_that_can_be_run_is_refused(tmp_path):
    save_tiny(tmp_path, "qwen3", "teacher")
    processor, file = tiny("qwen3", "teacher")[1], tmp_path / "model.safetensors"
    tensors, name = load_file(file), "model.norm.weight"
    args = GOLDConfig(output_dir=str(tmp_path), **FIELDS)
    for norm, text in (
        (None, "its checkpoint, got none"),
        (torch.int8, "16 or 32 bits, got torch."),
    ):
        own = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(own | ({} if norm is None else {name: tensors[name].to(norm)}), file)
        with pytest.raises(ValueError, match=rf"model\.norm\.weight in {text}"):
            read_tail(str(tmp_path), processor, args)

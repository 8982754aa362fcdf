"""What a run on vLLM is refused for before its models are loaded, and the line that starts its
server.
"""

import dataclasses
import itertools
import re
import shlex

import pytest

from gold_trainer import GOLDConfig, loading
from gold_trainer.__main__ import main
from gold_trainer.fields.library_options import check_library_options
from support.tiny_models import tiny_rows
from support.trainer_cases import FIELDS, make_trainer
from support.vllm_stub import GENERATE

LINE = "start it with: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out "


def config(**fields):
    return GOLDConfig(output_dir="unused", **(FIELDS | {"use_vllm": True, "lmbda": 1.0} | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_vllm": False, "vllm_mode": "colocate"}, "vllm_mode must be left out unless vLLM"),
        ({"lmbda": 0.0}, "use_vllm must be False where no micro-batch is on-policy"),
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode must be left out with vllm_"),
        (
            {"vllm_mode": "colocate", "vllm_server_port": 9},
            "vllm_server_port must be left out with",
        ),
        ({"vllm_mode": "colocate", "vllm_sync_dir": "/x"}, "vllm_sync_dir must be left out with"),
        (
            {"vllm_mode": "colocate", "async_rollouts": 1},
            "async_rollouts must be left out wit",
        ),
        (
            {"vllm_mode": "colocate", "vllm_tensor_parallel_size": 2},
            "_size must be left out with",
        ),
        ({"vllm_mode": "local"}, "vllm_mode must be 'server' or 'colocate', got 'local'"),
        (
            {"vllm_server_base_url": "localhost:8001"},
            "must be an address like http://localhost:8001,",
        ),
        (
            {"vllm_server_base_url": "http://a:1", "vllm_server_host": "b"},
            "vllm_server_host must be left out beside vllm_server_base_url",
        ),
        ({"vllm_group_port": 7}, "vllm_group_port must be left out with vllm_weight_sync='disk'"),
        (
            {"vllm_weight_sync": "nccl", "vllm_sync_dir": "/x"},
            "vllm_sync_dir must be left out with vllm_weight_sync='nccl'",
        ),
        (
            {"async_rollouts": 1, "vllm_sync_frequency": 2},
            "vllm_sync_frequency must be 1 with async_rollouts=1, got 2",
        ),
        ({"vllm_max_model_length": 100}, "vllm_max_model_length must be at least max_length, got"),
        ({"vllm_sync_frequency": 0}, "vllm_sync_frequency must be at least 1, got 0"),
        ({"vllm_server_port": 70000}, r"vllm_server_port must be in \[1, 65535\], got 70000"),
        (
            {"vllm_gpu_memory_utilization": 1.5},
            r"vllm_gpu_memory_utilization must be None or in \(0, 1\]",
        ),
        ({"vllm_request_timeout": 0}, "vllm_request_timeout must be positive and finite, got 0"),
    ],
)
def test_fields_that_nothing_reads_or_that_contradict_are_refused(fields, message):
    config()
    with pytest.raises(ValueError, match=f"^GOLDConfig: .*{message}"):
        config(**fields)


def never(*args, **options):
    raise AssertionError("models are loaded after the server is looked at")


@pytest.fixture
def refused(stub, tmp_path, monkeypatch):
    """Makes a trainer that the server's state refuses; the error."""
    monkeypatch.setattr(loading, "load_student", never)

    def error(match, **fields):
        options = {"lmbda": 1.0, **stub.fields, **fields}
        with pytest.raises((ValueError, OSError), match=match) as raised:
            make_trainer(tmp_path, tiny_rows(4), "qwen3", **options)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generation_kwargs": {"min_token": 4}}, r"got 'min_token'; .* did you mean min_tokens\?"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 4}}, "SamplingParams .* got 'no_repeat_ng"),
        (
            {
                "generation_kwargs": {"structured_outputs": {"regex": "a"}},
                "vllm_mode": "colocate",
                "vllm_server_base_url": None,
                "vllm_server_timeout": 240.0,
            },
            "SamplingParams .* got 'structured_outputs'; they are min_tokens",
        ),
        (
            {"generation_kwargs": {"min_tokens": 4}, "seq_kd": True, "lmbda": 0.5},
            "generation_kwargs must be left out with use_vllm and seq_kd, got .*'min_tokens': 4",
        ),
    ],
)
def test_arguments_that_vllm_would_drop_are_refused(fields, message, refused):
    refused(message, **fields)


def test_the_examples_of_generation_kwargs_can_be_set(tmp_path):
    fields = {field.name: field for field in dataclasses.fields(GOLDConfig)}
    given = re.findall(r"\{.*?\}", fields["generation_kwargs"].metadata["help"])
    own = [{}, {"use_vllm": True, "lmbda": 1.0}]
    for example, options in zip(given, own, strict=True):
        fields = {**FIELDS, "generation_kwargs": example, **options}
        check_library_options(GOLDConfig(output_dir=str(tmp_path), **fields))


def test_no_server_is_told_with_its_address_and_the_line_that_starts_it(refused):
    message = refused(
        r"expected at http://127.0.0.1:1, got no answer \(ConnectionError\) within 0.2 s \(vllm_s",
        vllm_server_base_url="http://127.0.0.1:1",
        vllm_server_timeout=0.2,
    )
    assert LINE in message and "--max-model-len 256" in message


def test_a_server_that_is_not_ready_is_waited_for(stub, refused):
    stub.answers["/health"] = 503
    refused("got the answer 503 within 0.1 s", vllm_server_timeout=0.1)
    waited = iter([503, {}])
    stub.answers["/health"] = lambda body: next(waited)
    with pytest.raises(AssertionError, match="after the server is looked at"):
        refused(None)


@pytest.mark.parametrize(
    ("answers", "settings", "fields", "message"),
    [
        ({"/version": {"version": "0.9.1"}}, {}, {}, "version 0.32 or newer, got 0.9.1; pip"),
        ({GENERATE: 403}, {}, {}, "/inference/v1/generate, got 403; .* without --enable-scale"),
        ({"/server_info": 404}, {}, {}, "/server_info, got 404; .* without VLLM_SERVER_DEV_MODE=1"),
        ({}, {"max_model_len": 100}, {}, "max_length=256 tokens, got --max-model-len 100; lower"),
        ({}, {"logprobs_mode": "raw_logprobs"}, {}, "from, got --logprobs-mode raw_logprobs"),
        ({}, {"max_num_seqs": 2}, {"num_generations": 4}, "num_generations=4 .* --max-num-seqs 2"),
        ({}, {}, {"rank": 4}, "adapters of rank 4, got none; set vllm_merge_adapter=True, or st"),
        ({}, {"max_lora_rank": 8}, {"rank": 9}, "adapters of rank 9, got --max-lora-rank 8; set"),
        (
            {"/v1/load_lora_adapter": 404},
            {"max_lora_rank": 8},
            {"rank": 8},
            "/v1/load_lora_adapter, got 404; .* without VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        ),
        ({}, {}, {"vllm_weight_sync": "nccl"}, "vllm_weight_sync='nccl' needs a GPU here, got"),
    ],
)
def test_a_server_that_is_started_otherwise_is_refused(
    answers, settings, fields, message, stub, refused
):
    stub.answers |= answers
    for name, value in settings.items():
        if name == "max_lora_rank":
            stub.config["lora_config"] = {name: value}
        part = "scheduler_config" if name == "max_num_seqs" else "model_config"
        stub.config[part][name] = value
    if rank := fields.pop("rank", None):
        peft = pytest.importorskip("peft")
        fields["peft_config"] = peft.LoraConfig(r=rank, target_modules=["q_proj"])
    error = refused(message, **fields)
    assert "start it with: VLLM_SERVER_DEV_MODE=1" in error or "pip install" in error or fields


def test_the_start_line_has_what_the_run_needs(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: some/model\nuse_vllm: true\nuse_peft: true\nlora_r: 12\n"
        "max_length: 512\nbf16: false\nuse_cpu: true\nnum_generations: 2\n"
        "per_device_train_batch_size: 2\nvllm_tensor_parallel_size: 2\noutput_dir: unused\n"
    )
    assert main(["vllm-command", str(file), "--vllm_server_port", "9000"]) == 0
    *environment, program, command, model = shlex.split(capsys.readouterr().out)[:5]
    assert environment == ["VLLM_SERVER_DEV_MODE=1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"]
    assert (program, command, model) == ("vllm", "serve", "some/model")
    assert main(["vllm-command", str(file), "--vllm_merge_adapter", "--lmbda", "0.7"]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[1:4] == ["vllm", "serve", "some/model"]
    options = " ".join(words[4:])
    assert options == (
        "--enable-scale-out --logprobs-mode processed_logprobs --generation-config vllm "
        "--dtype float32 --host 127.0.0.1 --port 8001 --max-model-len 512 "
        "--tensor-parallel-size 2 --model-impl vllm"
    )


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [("http://node7:9123", "node7", "9123"), ("https://node7/", "node7", "443")],
)
def test_the_start_line_has_the_address_and_the_revision_of_the_run(url, host, port, capsys):
    argv = ["vllm-command", "--output_dir", "unused", "--model_name_or_path", "m", "--use_vllm"]
    argv += ["--vllm_server_base_url", url, "--bf16", "false", "--use_cpu", "--lmbda", "1.0"]
    kwargs = '{"revision": "v2", "trust_remote_code": true}'
    assert main([*argv, "--model_init_kwargs", kwargs]) == 0
    words = shlex.split(capsys.readouterr().out)
    after = dict(itertools.pairwise(words))
    assert (after["--host"], after["--port"], after["--revision"]) == (host, port, "v2")
    assert "--trust-remote-code" in words
    assert main([*argv, "--model_revision", "v3", "--trust_remote_code"]) == 0
    assert "--revision v3 --trust-remote-code" in capsys.readouterr().out
    assert main(argv) == 0
    assert not {"--trust-remote-code", "--revision"} & set(shlex.split(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({}, 0.9),
        ({"vllm_mode": "colocate"}, 0.3),
        ({"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.5}, 0.5),
    ],
)
def test_an_engine_beside_a_student_that_trains_takes_less_of_the_memory(fields, share):
    assert config(**fields).vllm_memory_share == share


def test_a_run_without_a_server_has_no_start_line(tmp_path, capsys):
    assert main(["vllm-command", "--output_dir", str(tmp_path), "--model_name_or_path", "m"]) == 2
    assert "got use_vllm=False and vllm_mode='server'; set use_vllm: t" in capsys.readouterr().err
    assert main(["vllm-command", "--output_dir", str(tmp_path), "--use_vllm"]) == 2
    assert "model_name_or_path is missing" in capsys.readouterr().err

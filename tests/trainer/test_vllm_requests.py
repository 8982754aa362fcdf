"""What a vLLM server is asked, in which order, and what its answers mean: a stub answers.

test_vllm.py has the real one.
"""

import base64
import io
import time

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from gold_trainer import GOLDTrainer
from gold_trainer.rendering.prompts import prompt_ids
from gold_trainer.writers.vllm import sync as vllm_sync
from gold_trainer.writers.weights import checkpoint_weights, gathered_weights
from support.tiny_models import tiny, tiny_rows
from support.trainer_cases import make_trainer
from support.vllm_cases import PROMPTS, prompts_of
from support.vllm_stub import GENERATE, late

START = ["/health", "/version", GENERATE, "/server_info?config_format=json", "/v1/models"]
RESETS = ["/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"]
SYNC = ["/pause?mode=wait", "/collective_rpc", *RESETS, "/update_weight_version", "/resume"]
TEXTS = tiny_rows(12)


def make_text_run(output_dir, stub, num_rows=4, **fields):
    options = {"lmbda": 1.0, "max_steps": 2} | stub.fields | fields
    return make_trainer(output_dir, TEXTS[:num_rows], "qwen3", **options)


def wait_until(holds):
    """Of what other threads do."""
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, **options)


def with_adapters(stub):
    stub.config["lora_config"] = {"max_lora_rank": 8}
    return stub


def test_a_run_asks_for_completions_between_weights_that_it_brings_over(stub, tmp_path):
    run = make_text_run(tmp_path, stub, learning_rate=1.0)
    assert stub.paths == START
    gathered = gathered_weights(run.model, None, is_merged=True, is_kept=True)
    before = checkpoint_weights(run.model, gathered)
    run.train()
    assert stub.paths == [*START, *([*SYNC, *[GENERATE] * 4] * 2)]
    versions = [body["new_version"] for body in stub.bodies("/update_weight_version")]
    assert [version.split("-")[1] for version in versions] == ["0", "1"]
    saved = run.model.state_dict().keys() - {"lm_head.weight"}  # tied
    for weights in stub.weights:
        assert weights.keys() == saved
    assert all(torch.equal(tensor, before[name]) for name, tensor in stub.weights[0].items())
    assert not torch.equal(*(w["model.embed_tokens.weight"] for w in stub.weights))
    assert not any(folder.exists() for folder in stub.folders)


def test_weights_are_brought_over_as_often_as_the_config_says(stub, tmp_path):
    make_text_run(tmp_path, stub, max_steps=5, vllm_sync_frequency=2).train()
    versions = [body["new_version"] for body in stub.bodies("/update_weight_version")]
    assert [version.split("-")[1] for version in versions] == ["0", "2", "4"]


def test_a_second_run_of_a_trainer_brings_its_own_weights_over(stub, tmp_path):
    run = make_text_run(tmp_path, stub, max_steps=1, learning_rate=1.0)
    run.train()
    run.train()
    versions = [body["new_version"] for body in stub.bodies("/update_weight_version")]
    assert len(set(versions)) == 2 and all(version.endswith("-0") for version in versions)
    assert not torch.equal(*(w["model.embed_tokens.weight"] for w in stub.weights))


def test_an_adapter_goes_alone_under_a_new_name_each_time(stub, tmp_path):
    run = make_text_run(tmp_path, with_adapters(stub), peft_config=lora(), max_steps=3)
    run.train()
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    without = [path for path in SYNC if path != "/collective_rpc"]
    first = [*SYNC[:2], load, *SYNC[2:]]
    later = [without[0], load, unload, *without[1:]]
    calls = stub.paths[len(START) + 1 :]  # 1: whether adapters may be loaded
    assert calls == [*first, *[GENERATE] * 4, *([*later, *[GENERATE] * 4] * 2)]
    names = [body["lora_name"] for body in stub.bodies(load)[1:]]
    assert len(set(names)) == 3
    assert [body["lora_name"] for body in stub.bodies(unload)] == names[:2]
    asked = [body["model"] for body in stub.bodies(GENERATE)[1:]]
    assert asked == [name for name in names for _ in range(4)]
    below, *adapters = stub.weights
    assert not any("lora" in name or "base_layer" in name for name in below)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    for weights in adapters:
        assert f"{prefix}.lora_A.weight" in weights and len(weights) == 4


def test_a_merged_adapter_goes_as_whole_weights(stub, tmp_path):
    run = make_text_run(tmp_path, stub, peft_config=lora(), vllm_merge_adapter=True, max_steps=1)
    name = "model.layers.0.self_attn.q_proj"
    layer = run.model.get_submodule(f"base_model.model.{name}")
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    run.train()
    assert torch.allclose(stub.weights[0][f"{name}.weight"], expected, atol=1e-6)
    assert stub.weights[0].keys() == tiny("qwen3")[0].state_dict().keys() - {"lm_head.weight"}
    assert stub.bodies(GENERATE)[1]["model"] == "served"


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}]
)
def test_what_vllm_would_leave_out_of_an_adapter_is_refused(options, stub, tmp_path):
    message = "must be LoRA of the language model's layers.*set vllm_merge_adapter=True"
    with pytest.raises(ValueError, match=message):
        make_text_run(tmp_path, with_adapters(stub), peft_config=lora(**options))


def test_an_adapter_of_the_vision_tower_is_refused(stub, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "qkv"])
    with pytest.raises(ValueError, match=r"got .*visual\.blocks.*set vllm_merge_adapter=True"):
        make_trainer(tmp_path, PROMPTS, lmbda=1.0, peft_config=config, **with_adapters(stub).fields)


def test_a_request_has_ids_pictures_and_the_whole_sampling(stub, tmp_path):
    fields = {"temperature": 0.7, "top_p": 0.8, "top_k": 9, "min_p": 0.1}
    run = make_trainer(
        tmp_path,
        PROMPTS,
        lmbda=1.0,
        repetition_penalty=1.2,
        stop_strings=["stop"],
        generation_kwargs={"min_tokens": 2},
        **fields,
        **stub.fields,
    )
    prompt = next(p for p in prompts_of(run, 2) if len(p.example.images) == 2)
    example, processor = prompt.example, run.processing_class
    expanded = prompt_ids(processor, example.prompt_text, example.images)
    stub.expand = lambda body: expanded
    writer, sampling = run.rollouts.writers["student"], run.rollouts.sampling["student"]
    writer.sync_weights(run.model, 4)
    completions = writer.complete([prompt], sampling)[0]
    assert [(c.token_ids, c.logprobs, c.version) for c in completions] == [
        ([5, 6, 7], [-1.0] * 3, 4)
    ] * 2
    body = stub.bodies(GENERATE)[-1]
    image_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert body["token_ids"].count(image_id) == 2 < expanded.count(image_id)
    parts = body.pop("content_parts")
    for part, image in zip(parts, example.images, strict=True):
        assert part["type"] == "image_url"
        sent = Image.open(io.BytesIO(base64.b64decode(part["url"].partition("base64,")[2])))
        assert sent.tobytes() == image.tobytes() and sent.size == image.size
    params = body.pop("sampling_params")
    assert body == {"model": "served", "token_ids": body["token_ids"], "return_token_ids": True}
    banned = params.pop("logit_bias")
    num_entries = run.model.config.text_config.vocab_size
    assert banned == {str(i): -100.0 for i in sampling.banned_ids(num_entries)}
    assert str(image_id) in banned
    assert params == {
        **fields,
        "repetition_penalty": 1.2,
        "logprobs": 0,
        "ignore_eos": True,
        "stop_token_ids": list(sampling.end_ids),
        "stop": ["stop"],
        "include_stop_str_in_output": True,
        "detokenize": True,
        "min_tokens": 2,
        "n": 2,
        "max_tokens": prompt.room,
        "seed": prompt.seed,
    }


@pytest.mark.parametrize("path", [path.partition("?")[0] for path in SYNC])
def test_a_sync_that_fails_ends_the_run_and_never_resumes_the_server(path, stub, tmp_path):
    run = make_text_run(tmp_path, stub)
    stub.answers[path] = {"success": False} if path == "/reset_prefix_cache" else 500
    with pytest.raises(ValueError, match="must take the student's new weights, got an error"):
        run.train()
    assert stub.paths[-1].partition("?")[0] == path
    assert len(stub.bodies(GENERATE)) == 1, "the one at the start"


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (500, ConnectionError, "got 500: refused with 500; it has ended or failed, its log says"),
        (0, ConnectionError, r"got ConnectionError; it has ended or failed.*start it again with"),
        (late(3), TimeoutError, r"within 1 s \(vllm_request_timeout\), got nothing; raise it"),
        (404, ValueError, "must have /inference/v1/generate, got 404; it was started without --en"),
        (400, ValueError, r"^row \d: .* with pictures of \[\], got a refusal \(refused with 400\)"),
    ],
)
def test_errors_while_it_writes_are_one_sentence(answer, error, message, stub, tmp_path):
    run = make_text_run(tmp_path, stub, vllm_request_timeout=1.0)
    stub.answers[GENERATE] = answer
    with pytest.raises(error, match=message) as raised:
        run.train()
    assert "\n" not in str(raised.value)


def test_a_refused_picture_is_named_with_its_row_and_size(stub, tmp_path):
    run = make_trainer(tmp_path, PROMPTS, lmbda=1.0, **stub.fields)
    prompt = next(p for p in prompts_of(run) if len(p.example.images) == 1)
    stub.answers[GENERATE] = 400
    writer = run.rollouts.writers["student"]
    writer.sync_weights(run.model, 0)
    message = rf"^row {prompt.example.index}: .*pictures of \[\({prompt.example.images[0].width}, "
    with pytest.raises(ValueError, match=message):
        writer.complete([prompt], run.rollouts.sampling["student"])


def test_completions_of_other_weights_are_refused(stub, tmp_path):
    """Another run on the same server."""
    run = make_text_run(tmp_path, stub)
    stub.answers["/update_weight_version"] = {"success": True}
    with pytest.raises(ValueError, match=r"with the weights of step 0, .* got 'default'; another"):
        run.train()


def test_what_the_server_would_cut_in_silence_is_refused(stub, tmp_path):
    run = make_text_run(tmp_path, stub, max_length=None, max_completion_length=250)
    with pytest.raises(ValueError, match=r"^row 0: prompt and .* --max-model-len 256, got \d+ tok"):
        run.train()


def test_weights_that_have_no_room_are_refused(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_sync.shutil, "disk_usage", lambda root: type("", (), {"free": 1000}))
    run = make_text_run(tmp_path, stub, vllm_sync_dir=str(tmp_path / "sync"))
    with pytest.raises(ValueError, match=r"room for \d+ MiB of weights, got 0 MiB in .*/sync"):
        run.train()


def test_weights_that_a_full_disk_does_not_take_are_refused(stub, tmp_path, monkeypatch):
    def full(*args, **options):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(vllm_sync, "save_torch_state_dict", full)
    run = make_text_run(tmp_path, stub, vllm_sync_dir=str(tmp_path / "sync"))
    with pytest.raises(ValueError, match=r"must take \d+ MiB of weights, .*No space left.*; set"):
        run.train()
    assert not list((tmp_path / "sync").iterdir())


def test_videos_are_refused_by_row(stub, tmp_path):
    run = make_trainer(tmp_path, PROMPTS, lmbda=1.0, **stub.fields)
    run.rollouts.writers["student"].sync_weights(run.model, 0)
    prompt = prompts_of(run)[0]
    prompt.example.videos = [object()]
    with pytest.raises(ValueError, match=r"^row 0: vLLM writes for .* text and pictures, got 1"):
        run.rollouts.writers["student"]._complete(prompt, {})


def test_the_next_window_is_written_while_this_one_is_learnt(stub, tmp_path, monkeypatch):
    """Rollouts of step 2 come from the weights of step 1. The first window is written in time."""
    run = make_text_run(tmp_path, stub, num_rows=12, max_steps=3, async_rollouts=1)
    learn, asked_before_learning = GOLDTrainer.training_step, []

    def training_step(trainer, *args, **options):
        due = 4 * min(3, trainer.state.global_step + 2)
        wait_until(lambda: len(stub.bodies(GENERATE)) - 1 == due)
        asked_before_learning.append(len(stub.bodies(GENERATE)) - 1)
        return learn(trainer, *args, **options)

    monkeypatch.setattr(GOLDTrainer, "training_step", training_step)
    run.train()
    assert asked_before_learning == [8, 12, 12]
    versions = [body["new_version"] for body in stub.bodies("/update_weight_version")]
    assert [version.split("-")[1] for version in versions] == ["0", "1"]
    ages = [entry["rollout_age"] for entry in run.state.log_history if "loss" in entry]
    assert ages == [0.0, 1.0, 1.0]


def test_windows_ahead_end_with_the_epoch(stub, tmp_path):
    """Six rows, windows of four and two: the first of an epoch has the newest weights."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run = make_text_run(tmp_path, stub, num_rows=6, async_rollouts=1, max_steps=4, **sizes)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["rollout_age"] for entry in entries] == [0.0, 1.0, 0.0, 1.0]
    assert len(stub.bodies(GENERATE)) - 1 == 12


def test_an_error_of_a_window_ahead_ends_the_run(stub, tmp_path):
    run = make_text_run(tmp_path, stub, num_rows=12, max_steps=3, async_rollouts=1)
    answered = iter([None] * 4)
    stub.answers[GENERATE] = lambda body: next(answered, 500)
    with pytest.raises(ConnectionError, match="got 500: refused with 500; it has ended or failed"):
        run.train()
    assert run.state.global_step == 1

"""Rollouts of a real vLLM server: one for the whole file, whose last tests break it."""

from dataclasses import replace

import pytest
import torch

from gold_trainer import sampling_check
from gold_trainer.rendering.prompts import process_examples
from gold_trainer.writers.vllm import requests as vllm_requests
from gold_trainer.writers.vllm import sync as vllm_sync
from gold_trainer.writers.vllm.requests import GENERATE, request_body, sampling_params
from support.processes import start_ranks
from support.tiny_models import save_tiny, tiny
from support.trainer_cases import make_trainer
from support.vllm_cases import (
    PROMPTS,
    make_run,
    prompts_of,
    recorded_completions,
)
from support.vllm_server import running_server
from support.vllm_step import written

LORA_RANK = 8
SHARDED_CASES = ["full", "adapter", "merged"]


def student(seed=1):
    """With a head of its own: where vLLM runs on a CPU, tied ones do not follow new weights."""
    return tiny("qwen3_vl", "teacher", seed=seed)[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    model = save_tiny(folder / "model", "qwen3_vl", "teacher", seed=1)
    with running_server(model, folder, LORA_RANK) as running:
        yield running


def test_prompts_are_those_of_the_processor(server, tmp_path):
    run = make_run(tmp_path, server.fields, student())
    writer, prompts = run.rollouts.writers["student"], prompts_of(run)
    assert {len(prompt.example.images) for prompt in prompts} == {0, 1, 2}
    writer.sync_weights(run.model, 0)
    params = sampling_params(run.rollouts.sampling["student"], [])
    for prompt in prompts:
        body = request_body(prompt, params, run.processing_class, writer.model_name)
        answer = writer.server.post(GENERATE, body)
        expected = process_examples(run.processing_class, [prompt.example])["input_ids"][0]
        assert answer["prompt_token_ids"] == expected.tolist()


def test_greedy_completions_follow_the_weights_with_the_same_pictures_again(server, tmp_path):
    """Of weights B, then of A again: what generate() writes."""
    seeds = {"A": 1, "B": 2}
    runs = {name: make_run(tmp_path, server.fields, student(i)) for name, i in seeds.items()}
    writer = runs["A"].rollouts.writers["student"]
    written = {}
    for step, name in enumerate("ABA"):
        prompts, sampling = prompts_of(runs[name]), runs[name].rollouts.sampling["student"]
        sampling = replace(sampling, top_k=1)
        local = make_trainer(tmp_path, PROMPTS, student=runs[name].model, lmbda=1.0)
        local = local.rollouts.writers["student"]
        writer.sync_weights(runs[name].model, step)
        ids = [[c.token_ids for c in of_one] for of_one in writer.complete(prompts, sampling)]
        expected = local.complete(prompts, sampling)
        assert ids == [[c.token_ids for c in of_one] for of_one in expected]
        assert written.setdefault(name, ids) == ids
    assert written["A"] != written["B"]


def test_logprobs_are_the_students_at_every_step(server, tmp_path):
    run = make_run(
        tmp_path, server.fields, student(), num_generations=2, max_steps=3, learning_rate=0.5
    )
    windows = recorded_completions(run)
    run.train()
    assert [c.version for of_step in windows.steps for c in of_step] == [0] * 4 + [1] * 4 + [2] * 4
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["rollout_age"] for entry in entries] == [0.0] * 3
    assert all(entry[f"{sampling_check.NAME}/max"] < 1e-4 for entry in entries)
    first = [c.token_ids for c in windows.steps[0]]
    assert first[0] != first[1], "two completions of one prompt are two samples"


def test_a_completion_depends_on_its_seed_alone(server, tmp_path):
    run = make_run(tmp_path, server.fields, student(), temperature=2.0, top_p=1.0)
    writer, sampling = run.rollouts.writers["student"], run.rollouts.sampling["student"]
    writer.sync_weights(run.model, 0)
    prompts = prompts_of(run)
    together = [of_one[0].token_ids for of_one in writer.complete(prompts, sampling)]
    alone = [writer.complete([prompt], sampling)[0][0].token_ids for prompt in prompts]
    assert alone == together and len(set(map(tuple, together))) == len(together)
    # the second of two is the first of a prompt whose seed is higher by one
    pair = writer.complete([replace(prompts[0], num_completions=2)], sampling)[0]
    later = writer.complete([replace(prompts[0], seed=prompts[0].seed + 1)], sampling)[0]
    assert [c.token_ids for c in pair] == [alone[0], later[0].token_ids]


def test_end_tokens_stay_bans_hold_and_rooms_are_kept(server, tmp_path):
    run = make_run(tmp_path, server.fields, student(), temperature=2.0, top_p=1.0)
    writer = run.rollouts.writers["student"]
    writer.sync_weights(run.model, 0)
    ends, allowed = tuple(range(10, 20)), frozenset(range(10, 60))
    sampling = replace(run.rollouts.sampling["student"], end_ids=ends, token_ids=allowed)
    rooms = [1, 3, 6]
    prompts = [
        replace(prompt, room=room, num_completions=16)
        for prompt, room in zip(prompts_of(run), rooms, strict=False)
    ]
    for room, of_one in zip(rooms, writer.complete(prompts, sampling), strict=True):
        assert len(of_one) == 16
        for completion in of_one:
            *before, last = completion.token_ids
            assert set(completion.token_ids) <= allowed and not set(before) & set(ends)
            assert last in ends or len(completion.token_ids) == room
            assert len(completion.logprobs) == len(completion.token_ids) <= room
    assert any(c.token_ids[-1] in ends for c in of_one)
    assert any(len(c.token_ids) == rooms[-1] for c in of_one)


def test_stop_strings_and_penalties_are_the_local_writers(server, tmp_path):
    fields = {"repetition_penalty": 1.7, "top_k": 1, "max_completion_length": 24}
    run = make_run(tmp_path, server.fields, student(), **fields)
    writer, sampling = run.rollouts.writers["student"], run.rollouts.sampling["student"]
    writer.sync_weights(run.model, 0)
    local = make_trainer(tmp_path, PROMPTS, student=run.model, lmbda=1.0, **fields)
    local = local.rollouts.writers["student"]
    prompts = prompts_of(run)
    texts = [[c.token_ids for c in w.complete(prompts, sampling)[0]] for w in (writer, local)]
    assert texts[0] == texts[1]
    stop = run.processing_class.tokenizer.decode(texts[0][0][5:7])
    sampling = replace(sampling, stop_strings=(stop,))
    stopped = [[c.token_ids for c in w.complete(prompts, sampling)[0]] for w in (writer, local)]
    assert stopped[0] == stopped[1] == [texts[0][0][:7]]


@pytest.mark.parametrize("is_merged", [False, True])
def test_an_adapter_writes_alone_as_it_does_merged(is_merged, server, tmp_path):
    """At two steps with two states of it; the weights below it are not those of the server."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    fields = {"vllm_merge_adapter": is_merged, "top_k": 1}
    model = peft.get_peft_model(student(seed=5), config)
    run = make_run(tmp_path, server.fields, model, **fields)
    writer, sampling = run.rollouts.writers["student"], run.rollouts.sampling["student"]
    local = make_trainer(tmp_path, PROMPTS, student=model, lmbda=1.0, top_k=1)
    local = local.rollouts.writers["student"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    written = []
    for step in range(2):
        writer.sync_weights(model, step)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        written.append([c.token_ids for (c,) in writer.complete(prompts_of(run), sampling)])
        assert written[-1] == [c.token_ids for (c,) in local.complete(prompts_of(run), sampling)]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(-3.0)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert written[0] != written[1]


@pytest.mark.parametrize(
    ("engine", "cases"),
    [("ddp", ["full", "ahead", "failing"]), ("fsdp2", SHARDED_CASES), ("zero3", SHARDED_CASES)],
)
def test_two_processes_write_what_one_does(engine, cases, server, tmp_path):
    """Weights are whole on the server whatever the engine; an error on one rank reaches both."""
    output_dir = tmp_path / engine
    output_dir.mkdir()
    options = str(output_dir), engine, str(server.port), *cases
    done = start_ranks("vllm_step", 2, *options, seconds=240)
    assert done.returncode == 0, done.stderr[-6000:]
    results = torch.load(output_dir / "state.pt")
    for case in cases:
        first, second = results[case]
        if case == "failing":
            assert first["error"] == "rank 1: " + second["error"]
            assert second["error"].endswith("refused here alone")
            continue
        alone = written(tmp_path / case, server.port, case)
        assert not alone["error"] and not first["error"] and not second["error"]
        for ours, theirs, whole in zip(
            first["steps"], second["steps"], alone["steps"], strict=True
        ):
            assert not ours.keys() & theirs.keys() and ours | theirs == whole
        assert len(alone["steps"]) == 2


def test_a_resumed_run_writes_what_the_uninterrupted_one_does(server, tmp_path):
    def steps(resume=None):
        fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "temperature": 2.0}
        run = make_run(tmp_path, server.fields, student(), learning_rate=0.5, **fields)
        recorded = recorded_completions(run)
        run.train(resume_from_checkpoint=resume)
        return recorded.rows

    whole = steps()
    assert steps(resume=str(tmp_path / "checkpoint-2")) == whole[2:]
    assert len(whole) == 4 and whole[0].keys() == whole[2].keys()
    assert all(whole[0][row] != ids for row, ids in whole[2].items())


def test_rollouts_that_are_written_ahead_are_those_of_their_seeds(server, tmp_path):
    """Of weights that do not move: whenever they are written."""

    def steps(**fields):
        run = make_run(tmp_path, server.fields, student(), learning_rate=0.0, max_steps=3, **fields)
        recorded = recorded_completions(run)
        run.train()
        return recorded.rows

    assert steps(async_rollouts=1) == steps()


def test_a_prompt_that_the_server_sees_differently_is_refused(server, tmp_path, monkeypatch):
    """Ids with their pictures expanded: it would answer, to another prompt."""
    monkeypatch.setattr(
        vllm_requests,
        "unexpanded_ids",
        lambda processor, example: process_examples(processor, [example])["input_ids"][0].tolist(),
    )
    run = make_run(tmp_path, server.fields, student())
    with pytest.raises(ValueError, match=r"^row \d+: the vLLM server must see .* got \d+ tokens"):
        run.train()


def test_weights_that_the_server_cannot_load_end_the_run(server, tmp_path, monkeypatch):
    """It is broken then, as nothing but its next answer would show."""
    weights = vllm_sync.gathered_weights

    def of_another_shape(*args, **options):
        return {n: t[..., :3].clone() for n, t in weights(*args, **options).items()}

    monkeypatch.setattr(vllm_sync, "gathered_weights", of_another_shape)
    run = make_run(tmp_path, server.fields, student())
    with pytest.raises(ValueError, match="must take the student's new weights, got an error"):
        run.train()


def test_a_server_that_is_killed_ends_the_run_with_one_sentence(server, tmp_path):
    run = make_run(tmp_path, server.fields, student())
    server.kill()
    message = "must answer /pause, got ConnectionError; it has ended"
    with pytest.raises(ValueError, match=message) as error:
        run.train()
    assert "\n" not in str(error.value)

"""The writer of a model in this process: a cache of fixed size, and the tokens of generate()."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers.generation import logits_process as library

from gold_trainer.models import base_model
from gold_trainer.rendering.prompts import process_examples, tokenizer_of
from gold_trainer.writers import Prompt, decoding, fixed_cache, local
from gold_trainer.writers.cast_weights import cast_weights
from gold_trainer.writers.writer import has_stop
from support.tiny_models import tiny_rows
from support.trainer_cases import make_trainer

ROOM = 12
FIXED = ["qwen3", "llama", "qwen3_vl", "qwen2_5_vl", "gemma3", "llava", "smolvlm", "idefics3"]


def build(tmp_path, family="qwen3_vl", num_rows=4, **fields):
    """Trainer, the student's writer, and prompts of different lengths."""
    images = {} if family in ("qwen3", "llama") else {"images": "mixed"}
    rows = [{**r, "messages": r["messages"][:1]} for r in tiny_rows(num_rows, **images)]
    run = make_trainer(tmp_path, rows, family, lmbda=1.0, max_length=None, **fields)
    batch = run.data_collator([run.train_dataset[i] for i in range(num_rows)])
    examples = [example.unanswered() for example in batch.examples]
    assert len({example.prompt_length for example in examples}) > 1
    prompts = [Prompt(e, ROOM + i, 1000 * i) for i, e in enumerate(examples)]
    return run, run.rollouts.writers["student"], prompts


def sampling_of(run, **changes):
    return replace(run.rollouts.sampling["student"], **changes)


def ids_of(written):
    return [[completion.token_ids for completion in part] for part in written]


def inputs_of(run, prompt):
    return process_examples(run.processing_class, [prompt.example])


@pytest.mark.parametrize("family", FIXED)
def test_greedy_tokens_are_those_of_generate(family, tmp_path):
    run, writer, prompts = build(tmp_path, family)
    sampling = sampling_of(run, top_k=1)
    prompts[1] = replace(prompts[1], num_completions=2)
    written = writer.complete(prompts, sampling)
    assert writer.refusal is None and writer.bytes_per_token > 0
    assert written[1][0] == written[1][1]
    banned = sampling.banned_ids(run.model.get_output_embeddings().out_features)
    for prompt, (completion, *_) in zip(prompts, written, strict=True):
        inputs = inputs_of(run, prompt)
        options = {"eos_token_id": list(sampling.end_ids), "suppress_tokens": banned}
        output = run.model.eval().generate(
            **inputs, do_sample=False, max_new_tokens=prompt.room, **options
        )
        assert completion.token_ids == output[0, inputs["input_ids"].shape[1] :].tolist()
        assert completion.logprobs == [0.0] * len(completion.token_ids), "there was no choice"


@pytest.mark.parametrize("family", ["qwen3_vl", "lfm2_vl"])
def test_logprobs_are_those_of_the_distribution_that_is_sampled_from(family, tmp_path):
    """Beside transformers' own processors, on one pass over prompt and completion."""
    run, writer, prompts = build(tmp_path, family, max_completion_length=ROOM)
    sampling = sampling_of(
        run, temperature=0.8, top_k=300, top_p=0.9, min_p=0.002, repetition_penalty=1.3
    )
    written = writer.complete(prompts, sampling)
    banned = sampling.banned_ids(run.model.get_output_embeddings().out_features)
    processors = library.LogitsProcessorList(
        [
            library.SuppressTokensLogitsProcessor(banned),
            library.RepetitionPenaltyLogitsProcessor(1.3),
            library.TemperatureLogitsWarper(0.8),
            library.TopKLogitsWarper(300),
            library.TopPLogitsWarper(0.9),
            library.MinPLogitsWarper(0.002),
        ]
    )
    for prompt, (completion,) in zip(prompts, written, strict=True):
        inputs = inputs_of(run, prompt)
        width, ids = inputs["input_ids"].shape[1], completion.token_ids
        output = run.model.eval().generate(
            **inputs,
            max_new_tokens=len(ids),
            do_sample=False,
            logits_processor=[Forced(ids, width)],
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
        for i, (token_id, logits) in enumerate(zip(ids, output.logits, strict=True)):
            seen = output.sequences[:, : width + i]
            logprobs = processors(seen, logits).log_softmax(-1)
            assert completion.logprobs[i] == pytest.approx(logprobs[0, token_id].item(), abs=2e-4)


def test_the_prompts_pass_makes_nothing_that_waits_for_the_device(tmp_path, monkeypatch):
    """generate() looks at all ids to make processors of logits, which nobody asks for here."""
    run, writer, prompts = build(tmp_path, "qwen3", num_rows=2)

    def make(*args, **kwargs):
        raise AssertionError("it would be looked at")

    monkeypatch.setattr(type(run.model), "_get_logits_processor", make)
    writer.complete(prompts, sampling_of(run))
    assert writer.refusal is None and "_get_logits_processor" not in vars(run.model)


class Forced:
    """Writes given ids."""

    def __init__(self, ids, width):
        self.ids, self.width = ids, width

    def __call__(self, input_ids, scores):
        token = torch.tensor([[self.ids[input_ids.shape[1] - self.width]]])
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


def test_a_completion_depends_on_its_seed_alone(tmp_path):
    """Not on the rows beside it, how many the cache holds, nor on who decodes."""
    run, writer, prompts = build(tmp_path, "qwen3")
    sampling = sampling_of(run, temperature=1.5)
    prompts = [replace(prompt, num_completions=2) for prompt in prompts]
    together = ids_of(writer.complete(prompts, sampling))
    assert len({tuple(ids) for part in together for ids in part}) == 8
    assert ids_of(writer.complete(prompts[::-1], sampling)) == together[::-1]
    assert ids_of(writer.complete(prompts[2:3], sampling)) == together[2:3]
    split = replace(prompts[0], seed=prompts[0].seed + 1, num_completions=1)
    assert ids_of(writer.complete([split], sampling)) == [together[0][1:]]
    run.args.rollout_cache_gib = 1e-9
    assert writer._rows_at_a_time(prompts) == 1
    assert ids_of(writer.complete(prompts, sampling)) == together
    writer.refusal = "generate() writes"
    assert ids_of(writer.complete(prompts, sampling)) == together
    other = [replace(prompt, seed=prompt.seed + 7) for prompt in prompts]
    assert not {str(ids) for ids in ids_of(writer.complete(other, sampling))} & set(
        map(str, together)
    )


def test_rows_that_have_ended_leave_and_the_cache_with_them(tmp_path, monkeypatch):
    run, writer, prompts = build(tmp_path, "qwen3")
    rooms = [3, 40, 20, 40]
    prompts = [replace(p, room=room) for p, room in zip(prompts, rooms, strict=True)]
    sizes, layers = [], []
    step, create = decoding.next_logits, fixed_cache.FixedLayer.__init__

    def record(base, batch, *rest):
        sizes.append(len(batch.token))
        return step(base, batch, *rest)

    def created(self, *tensors):
        create(self, *tensors)
        layers.append(weakref.ref(self))

    monkeypatch.setattr(decoding, "next_logits", record)
    monkeypatch.setattr(fixed_cache.FixedLayer, "__init__", created)
    sampling = sampling_of(run, end_ids=(10**6,))  # none ends by itself
    written = writer.complete(prompts, sampling)
    assert [len(ids) for (ids,) in ids_of(written)] == rooms
    sizes = sizes[1:]  # the first compares the cache with the model's own
    assert sizes[:16] == [4] * 16 and sizes[-1] == 2 and 3 in sizes
    assert sizes == sorted(sizes, reverse=True)
    gc.collect()
    assert layers and not any(layer() for layer in layers)


def test_a_smaller_batch_is_recorded_where_it_saves_more_than_that_takes():
    """Recording takes as long as 50 steps, and a row is a hundredth of one."""
    recorded, plain = SimpleNamespace(is_recorded=True), SimpleNamespace(is_recorded=False)
    pays = decoding.Decoder._pays
    assert not pays(recorded, 3, 240) and not pays(recorded, 15, 240)
    assert pays(recorded, 48, 200) and pays(recorded, 8, 4000)
    assert pays(plain, 1, 1) and not pays(plain, 0, 4000) and not pays(recorded, 0, 4000)


def test_a_stop_string_ends_a_completion_and_stays_in_it(tmp_path):
    run, writer, prompts = build(tmp_path, "qwen3")
    sampling = sampling_of(run, top_k=1, end_ids=(10**6,))
    prompts = [replace(prompt, room=40) for prompt in prompts]
    tokenizer = tokenizer_of(run.processing_class)
    whole = [ids for (ids,) in ids_of(writer.complete(prompts, sampling))]
    stop = tokenizer.decode(whole[0][4:6])
    assert stop.strip() and "\N{REPLACEMENT CHARACTER}" not in stop
    sampling = replace(sampling, stop_strings=(stop,))
    for refusal in (None, "generate() writes"):
        writer.refusal = refusal
        for before, (ids,) in zip(whole, ids_of(writer.complete(prompts, sampling)), strict=True):
            assert ids == before[: len(ids)]
            assert has_stop(tokenizer, (stop,), ids) or len(ids) == 40
            assert not has_stop(tokenizer, (stop,), ids[:-1])
        assert len(ids_of(writer.complete(prompts, sampling))[0][0]) <= 6


def test_a_model_that_keeps_states_is_written_by_generate_and_named_once(tmp_path, caplog):
    run, writer, prompts = build(tmp_path, "lfm2_vl")
    for _ in range(2):
        writer.complete(prompts, sampling_of(run))
    messages = [record.getMessage() for record in caplog.records]
    told = [m for m in messages if "writes completions with generate()" in m]
    assert len(told) == 1 and "Lfm2VlForConditionalGeneration" in told[0]
    assert "its cache has a " in told[0]
    teachers = run.rollouts.writers["teacher"]  # of the same class
    teachers.complete(prompts, sampling_of(run))
    told = caplog.records[-1].getMessage()
    assert told.startswith("Lfm2VlForConditionalGeneration of the teacher writes completions with")


def test_a_step_that_is_not_the_models_own_is_refused(tmp_path, monkeypatch):
    """A model may do with a fixed cache what nobody has foreseen: one step is compared first."""
    run, writer, prompts = build(tmp_path, "qwen3")
    keep = fixed_cache.FixedLayer.update

    def forgets(self, keys, values, *args, **kwargs):
        keep(self, keys, values)
        return torch.zeros_like(self.keys), self.values

    monkeypatch.setattr(fixed_cache.FixedLayer, "update", forgets)
    sampling = sampling_of(run)
    written = writer.complete(prompts, sampling)
    assert writer.refusal == "with it the next token would be another"
    monkeypatch.undo()
    writer.refusal = None
    assert ids_of(writer.complete(prompts, sampling)) == ids_of(written)


def test_arguments_of_generation_are_generates(tmp_path):
    run, writer, prompts = build(tmp_path, "qwen3", generation_kwargs={"min_new_tokens": 5})
    sampling = sampling_of(run, top_k=1)
    ends = tuple(ids[0] for (ids,) in ids_of(writer.complete(prompts, sampling)))
    written = ids_of(writer.complete(prompts, replace(sampling, end_ids=ends)))
    assert all(len(ids) >= 5 for (ids,) in written)
    assert "generation_kwargs has min_new_tokens" in writer.refusal
    without = replace(sampling, end_ids=ends, generation_kwargs={})
    assert any(len(ids) == 1 for (ids,) in ids_of(writer.complete(prompts, without)))


@pytest.mark.parametrize("adapter", [False, True])
def test_autocast_writes_the_same_from_matrices_that_are_cast_once(adapter, tmp_path, monkeypatch):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    run, writer, prompts = build(tmp_path, "qwen3_vl", peft_config=config if adapter else None)
    base = base_model(run.model)
    before = {name: id(parameter) for name, parameter in base.named_parameters()}
    sampling, seen = sampling_of(run), []
    with torch.autocast("cpu", torch.bfloat16):
        with cast_weights(base, torch.device("cpu")) as num_bytes:
            assert base.lm_head.weight.dtype == torch.bfloat16
            assert base.get_input_embeddings().weight.dtype == torch.float32
            seen.append(num_bytes)
        fast = writer.complete(prompts, sampling)
        monkeypatch.setattr(local, "cast_weights", cast_nothing)
        assert writer.complete(prompts, sampling) == fast
    assert seen[0] > 0
    assert {name: id(parameter) for name, parameter in base.named_parameters()} == before
    with cast_weights(base, torch.device("cpu")) as num_bytes:
        assert num_bytes == 0 and base.lm_head.weight.dtype == torch.float32


def cast_nothing(*args):
    return cast_weights(torch.nn.Identity(), torch.device("cpu"))


def test_an_adapters_student_writes_with_its_adapter(tmp_path):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    run, writer, prompts = build(tmp_path, "qwen3", peft_config=config)
    sampling = sampling_of(run, top_k=1)
    written = ids_of(writer.complete(prompts, sampling))
    writer.refusal = "generate() writes"
    assert ids_of(writer.complete(prompts, sampling)) == written
    writer.refusal = None
    with run.model.disable_adapter():
        assert ids_of(writer.complete(prompts, sampling)) != written


@pytest.mark.gpu
@pytest.mark.parametrize("family", FIXED)
def test_a_recorded_step_writes_what_an_eager_one_does_and_gives_its_memory_back(family, tmp_path):
    run, writer, prompts = build(tmp_path, family, use_cpu=False, bf16=False)
    run.model.cuda()
    for changes in ({"top_k": 1}, {}, {"repetition_penalty": 1.2, "stop_strings": ("zq",)}):
        sampling = sampling_of(run, **changes)
        expected = ids_of(writer.complete(prompts, sampling))
        before = torch.cuda.memory_allocated()
        assert ids_of(writer.complete(prompts, sampling)) == expected
        assert torch.cuda.memory_allocated() <= before + 2**20
        assert writer.record_seconds > 0
        writer.refusal = "generate() writes"
        assert ids_of(writer.complete(prompts, sampling)) == expected
        writer.refusal = None


def test_the_writers_cache_is_half_of_what_is_free_unless_it_is_given(tmp_path):
    run, writer, prompts = build(tmp_path, "qwen3", rollout_cache_gib=0.5)
    assert writer._cache_bytes() == 2**29
    run.args.rollout_cache_gib = None
    assert writer._cache_bytes() == 4 * 2**30  # on a CPU
    writer.bytes_per_token = 2**30 // fixed_cache.cache_length(64, 64)
    rows = [replace(p, example=replace(p.example, prompt_length=64), room=64) for p in prompts]
    assert writer._rows_at_a_time(rows * 3) == 4

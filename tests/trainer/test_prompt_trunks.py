"""Which rows share a prompt, and how their tokens stand in one sequence."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gold_trainer.batches import Example, WindowBatch
from gold_trainer.rendering.collator import build_side
from gold_trainer.speed import packing
from gold_trainer.speed.kinds import TEXT
from gold_trainer.speed.segments import attention_is, within
from gold_trainer.speed.shared_prompts import (
    Counts,
    Keys,
    scored_places,
    segments_of,
    trunks_of,
)
from support.tiny_models import tiny, tiny_picture, tiny_processor, tiny_text

PICTURE = tiny_picture(0)


def example(prompt, completion, images=(), **fields):
    return Example(0, prompt, len(prompt), list(images), list(completion), **fields)


EXAMPLES = [
    example("ab", [1, 2, 3]),
    example("abc", [4]),  # the other one is its beginning
    example("ab", [5, 6]),
    example("ab", [7], adds_special_tokens=True),
    example("pic", [8], [PICTURE]),
    example("pic", [9], [PICTURE.copy()]),
    example("pic", [], [PICTURE]),
    example("ab", [10], is_cut=True),
]


def test_rows_share_a_prompt_that_is_the_same_with_the_same_pictures():
    trunks = trunks_of(EXAMPLES)
    assert [trunk.members for trunk in trunks] == [[0, 2], [1], [3], [4, 6], [5], [7]]
    assert trunks[0].example == replace(EXAMPLES[0], completion_ids=[1, 2, 3, 5, 6])
    assert trunks[3].example.written_ids == [8] and trunks[3].parts(4) == [3, 1, 0]
    lengths = [5, 4, 4, 3, 4, 4, 3, 3]
    assert Counts.of(EXAMPLES) == (sum(lengths) - 2 - 3, sum(lengths), 8 * 5)


def test_a_completion_stands_behind_the_others_and_sees_the_prompt_and_itself():
    segments = segments_of([[3, 2, 1], [2, 4]])
    assert segments.bounds.tolist() == [0, 3, 5, 6, 12, 12, 12] and segments.longest == 6
    assert segments.offsets.tolist() == [0] * 5 + [2] + [0] * 6
    assert segments.keys.bounds.tolist() == [0, 3, 8, 12, 18, 18, 18], "the last two are empty"
    assert segments.keys.longest == 6
    behind = [*range(3), *range(5), 0, 1, 2, 5, *range(6, 12)]
    assert segments.keys.places.tolist() == behind


def test_the_end_of_a_prompt_predicts_the_first_token_of_each_completion():
    shared = [[2, 3, 2], [3, 1], [2, 1], [3, 1, 0], [3, 1], [2, 1]]
    rows = scored_places(trunks_of(EXAMPLES), shared, 7)
    # by example: of the first trunk 3 tokens, of the second one, of the first two more
    assert rows.tolist() == [1, 2, 3, 9, 1, 5, 15, 23, 30, 36]


def logits(model, ids, mask, shared, rows):
    inputs = {"input_ids": ids, "attention_mask": mask}
    with attention_is(packing.OF_ROWS, packing._configs(model)), torch.no_grad():
        packed, places = packing.packed(model, inputs, mask, rows, shared)
        return model(**packed).logits[0, places]


@pytest.mark.parametrize("window", [3, None])
def test_attention_in_windows_reaches_back_into_the_prompt(window):
    torch.manual_seed(0)
    model = tiny_text("mistral", sliding_window=window)
    prompt, first, second = torch.randint(64, (4,)), torch.randint(64, (5,)), torch.tensor([7, 9])
    joined = torch.cat([prompt, first, second])[None]
    shared = logits(model, joined, torch.ones_like(joined), [[4, 5, 2]], torch.arange(11))
    with torch.no_grad():
        one = model(input_ids=torch.cat([prompt, first])[None]).logits[0]
        other = model(input_ids=torch.cat([prompt, second])[None]).logits[0, 4:]
    torch.testing.assert_close(shared, torch.cat([one, other]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TEXT)
def test_each_kind_of_text_learns_from_shared_prompts_what_it_does_from_rows(name):
    """In float64, but for norms: prompts and completions of random lengths, in any order."""
    rng, tokenizer = random.Random(name), tiny_processor("qwen3")
    torch.manual_seed(0)
    window = None if name in packing.WINDOW_IN_ONE else 3
    model = tiny_text(name, sliding_window=window, vocab_size=len(tokenizer)).double()
    if hasattr(model.config, "num_experts") or hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # others have no float64
    examples = []
    for text in ("red", "a blue cat", "two cats and a dog"):
        for size in rng.choices((0, 1, 2, 5, 9), k=rng.randint(1, 4)):
            examples.append(example(text, rng.choices(range(len(tokenizer)), k=size)))
    rng.shuffle(examples)
    results = []
    for shares in (False, True):
        model.zero_grad()
        inputs = build_side(tokenizer, examples, lambda tensor: tensor, shares_prompts=shares)
        kept, mask = inputs.tensors, inputs.tensors["attention_mask"]
        with attention_is(packing.OF_ROWS, packing._configs(model) if shares else []):
            tensors, rows = kept, inputs.scored_rows
            if shares:
                tensors, rows = packing.packed(model, kept, mask, rows, inputs.shared)
            logits = model(**tensors, use_cache=False).logits.flatten(0, 1)[rows]
        logits.logsumexp(-1).sin().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*reversed(results), rtol=1e-4, atol=1e-7)


def test_gradients_of_a_token_for_all_that_see_it_are_added_up_in_32_bits():
    """In 16 bits a sum of ones ends at 256."""
    number = 512
    segments = segments_of([[1, *[1] * number]])
    query, value = torch.zeros(2, 1, 1, 1 + number, 8).unbind()
    value = value.bfloat16().requires_grad_()
    states = within(
        *(query.bfloat16(), query.bfloat16(), value, segments.bounds, 1, None),
        is_causal=True,
        keys=segments.keys,
    )
    states.sum().backward()
    assert value.grad[0, 0, 0, 0] == 1 + number / 2, "each completion attends to both tokens alike"


def packing_of(device, student=None, teacher=None, **fields):
    args = {"padding_free": False, "share_prompts": None, "neftune_noise_alpha": None}
    args |= {"bf16": True, "fp16": False, "device": torch.device(device)} | fields
    sides = {"student": student or tiny("qwen3")[0], "teacher": teacher}
    return packing.Packing(SimpleNamespace(**args), sides)


def batch_of(*lengths):  # of completions of a prompt of 10 tokens
    examples = [example("p" * 10, [1] * length) for length in lengths]
    return WindowBatch(examples, examples)


def test_by_default_prompts_are_shared_on_a_gpu_where_that_spares_a_fifth(monkeypatch):
    monkeypatch.setattr(packing, "can_attend", lambda device, dtype: True)
    few, many = batch_of(41, 41), batch_of(10, 10)  # 92 of 102 positions, 30 of 40
    assert not packing_of("cpu").shares(many)
    on_gpu = packing_of("cuda")
    assert on_gpu.shares(many) and not on_gpu.shares(few)
    assert on_gpu.shares(batch_of(41, 10)), "71 of 102: what is not padded counts"
    assert packing_of("cuda", share_prompts=True).shares(few)
    assert packing_of("cpu", padding_free=True).shares(few)
    assert not packing_of("cuda", padding_free=True, share_prompts=False).shares(many)
    assert not packing_of("cuda", teacher=tiny("gemma3")[0]).shares(many), "the other one cannot"
    monkeypatch.setattr(packing, "can_attend", lambda device, dtype: False)
    assert not packing_of("cuda").shares(many)


def test_a_teacher_that_is_elsewhere_does_not_count():
    batch = batch_of(41, 41)
    own = [example(letter * 90, [1]) for letter in "ab"]
    apart = replace(batch, teacher_examples=own)
    assert packing_of("cpu", share_prompts=True).shares(apart)
    both = packing_of("cpu", share_prompts=True, teacher=tiny("qwen3", "teacher")[0])
    assert both.shares(apart) and not both.shares(replace(apart, examples=own))


def test_a_loss_of_routers_counts_each_rows_prompt(monkeypatch):
    student = tiny("qwen3")[0]
    monkeypatch.setattr(student.config, "output_router_logits", True, raising=False)
    with pytest.raises(ValueError, match=r"share_prompts must be False where routers have a loss"):
        packing_of("cpu", student, share_prompts=True)
    assert not packing_of("cpu", student, padding_free=True).shares(batch_of(10, 10))


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("window", [None, 20])
def test_the_kernel_for_segments_attends_to_the_prompt_and_to_oneself(window, is_compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    attend = torch.compile(within, fullgraph=True) if is_compiled else within
    for shared in ([[216, *[256] * 8]], [[37, 5, 0, 130], [90, 64]], [[1, 3, 2], [300, 64]]):
        segments = segments_of(shared)
        sizes = [(1, heads, int(segments.bounds[-1]), 64) for heads in (4, 2, 2)]
        states = [torch.randn(size).bfloat16() for size in sizes]
        weights = torch.randn(1, sizes[0][2], 4, 64)
        results = []
        for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
            places, bounds, longest = segments.keys
            keys = Keys(places.to(device), bounds.to(device), longest)
            own = [part.to(device, dtype).requires_grad_() for part in states]
            function = within if device == "cpu" else attend
            result = function(
                *own,
                segments.bounds.to(device),
                segments.longest,
                0.125,
                is_causal=True,
                window=window,
                keys=keys,
            )
            (result.float() * weights.to(device)).sum().backward()
            results.append([result, *(part.grad for part in own)])
        for expected, actual in zip(*results, strict=True):
            error = (actual.float().cpu() - expected).norm()
            assert error < 6e-3 * expected.norm(), "one rounding to bf16 is 1.7e-3"

"""Chat templates of real models on both sides of a distillation across tokenizers: each side sees
its own template around an answer, texts are compared with texts, and marks with nothing.
"""

import unicodedata
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gold_trainer.data.dataset import RowDataset
from gold_trainer.rendering.collator import GOLDCollator
from gold_trainer.rendering.frames import CONTENT, THOUGHT_KEYS, THOUGHTS
from support.chat_templates import (
    END_OF_TEXT,
    LITERALS,
    NUM_EXAMPLES,
    templated,
    text_template_names,
)
from support.template_pairs import paired

NAMES = text_template_names()
# Around each text stands a pair of quotes that no template writes: it is found among the marks.
QUOTES = {THOUGHTS: ("\u00ab", "\u00bb"), CONTENT: ("\u2039", "\u203a")}
BLANKS = st.sampled_from(["", "", " ", "\n", "\n\n", " \n"])
WORDS = st.lists(
    st.one_of(
        st.sampled_from((*LITERALS, "A red bar.", "2 + 2 = 4", "  ", "\n\n", "{}")),
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co", "Cc"]), max_size=6),
    ),
    max_size=4,
).map(lambda parts: unicodedata.normalize("NFC", "".join(parts)))
CALL = {"name": "weather", "arguments": {"city": "Ulm"}}
CALLS = [{"id": "abcdefghi", "type": "function", "function": CALL}]
EARLIER = [
    {"role": "user", "content": "Hello."},
    {"role": "assistant", "content": "Yes?", "reasoning_content": "One greets."},
]
pytestmark = pytest.mark.skipif(not NAMES, reason="templates come with trl, of the extra dev")


def quoted(kind):
    before, behind = QUOTES[kind]
    return st.builds(lambda a, text, b: a + before + text + behind + b, BLANKS, WORDS, BLANKS)


@lru_cache
def collator_of(name, tokenizer_name):
    tokenizer = templated(name, tokenizer_name)
    return GOLDCollator(tokenizer, [tokenizer.eos_token_id], None)


def pair_collator(names, tokenizer_names):
    return paired(*(collator_of(*side) for side in zip(names, tokenizer_names, strict=True)))


def spelled(table, example):
    return b"".join(table.pieces[i] for i in example.written_ids)


def group_ends(table, example, base_rows, base_ids, scalar_rows, scalar_ids, scalar_groups):
    """At which byte of a completion each group begins and ends."""
    ends = [0]
    for token_id in example.written_ids:
        ends.append(ends[-1] + len(table.pieces[token_id]))
    rows = [[row] for row in base_rows.tolist()]
    for row, group in zip(scalar_rows.tolist(), scalar_groups.tolist(), strict=True):
        rows[group].append(row)
    return [(ends[min(run)], ends[max(run) + 1]) for run in rows]


def check_groups(collator, batch, kinds):
    """Every group lies in one text on both sides, at the same bytes of it; nothing of a text but
    its last token is left out.
    """
    alignment = batch.alignment.groups
    sides = []
    aligner = collator.pairs.aligner
    for table, example, fields in zip(
        (aligner.student, aligner.teacher),
        (batch.examples[0], batch.teacher_examples[0]),
        alignment.sides,
        strict=True,
    ):
        whole = spelled(table, example)
        regions = []
        for kind in kinds:
            before, behind = (quote.encode() for quote in QUOTES[kind])
            regions.append((whole.index(before), whole.index(behind) + len(behind)))
        found = []
        for start, end in group_ends(table, example, *fields):
            if start == end:
                found.append("end of turn")
                continue
            core = next((i for i, (a, b) in enumerate(regions) if a < end and start < b), None)
            if core is None:  # blanks that both templates leave around a text
                assert not whole[start:end].strip(), "a mark is in a group"
                continue
            first, stop = regions[core]
            text = whole[max(start, first) : min(end, stop)]
            assert not whole[start:first].strip() and not whole[stop:end].strip()
            found.append((core, text, start >= first, end <= stop))
        sides.append((found, [whole[a:b] for a, b in regions]))
    (own, own_texts), (other, other_texts) = sides
    assert own_texts == other_texts
    assert [group[:2] for group in own] == [group[:2] for group in other]
    for core, text in enumerate(own_texts):
        got = b"".join(group[1] for group in own if group[0] == core)
        assert text.startswith(got) and len(text) - len(got) <= 12, "more than a token is left out"
    return own


@settings(
    max_examples=NUM_EXAMPLES or 60,
    deadline=None,
    derandomize=not NUM_EXAMPLES,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(
    names=st.tuples(st.sampled_from(NAMES or [""]), st.sampled_from(NAMES or [""])),
    tokenizer_names=st.sampled_from([("qwen", "gpt2"), ("gpt2", "qwen")]),
    content=quoted(CONTENT),
    thoughts=st.one_of(st.none(), quoted(THOUGHTS)),
    key=st.sampled_from(THOUGHT_KEYS),
    earlier=st.booleans(),
    has_calls=st.booleans(),
    enable_thinking=st.sampled_from([None, True, False]),
)
def test_texts_are_compared_with_texts(
    names, tokenizer_names, content, thoughts, key, earlier, has_calls, enable_thinking
):
    question = {"role": "user", "content": "What?"}
    answer = {"role": "assistant", "content": content}
    if thoughts is not None:
        answer[key] = thoughts
    if has_calls:
        answer["tool_calls"] = CALLS
    prompt = [*EARLIER[: 2 * earlier], question]
    kwargs = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    collator = pair_collator(names, tokenizer_names)
    rendered = []
    for side in (collator.student, collator.teacher):
        try:
            text = side.tokenizer.apply_chat_template([*prompt, answer], tokenize=False, **kwargs)
        except Exception:  # of jinja2: some take no calls beside thoughts
            assume(False)
        rendered.append(text)
    row = {"messages": [*prompt, answer], "chat_template_kwargs": kwargs}
    batch = collator([RowDataset([row], needs_completion=True, is_text=True)[0]])
    for side, (example,), text in zip(
        (collator.student, collator.teacher),
        (batch.examples, batch.teacher_examples),
        rendered,
        strict=True,
    ):
        seen = example.prompt_text + side.tokenizer.decode(example.written_ids)
        end = side.tokenizer.decode(example.written_ids[-1:])
        assert text.startswith(seen) or text == seen.removesuffix(end)
        behind = text.removeprefix(seen.removesuffix(end)).removeprefix(end)
        assert behind.strip() in ("", END_OF_TEXT)  # Phi writes it behind the last turn
    kinds = [
        kind for kind in (THOUGHTS, CONTENT) if all(QUOTES[kind][1] in text for text in rendered)
    ]
    groups = check_groups(collator, batch, kinds)
    if not kinds:
        assert batch.alignment.skip_reasons[0] is not None
    elif not has_calls:
        assert groups[-1] == "end of turn"

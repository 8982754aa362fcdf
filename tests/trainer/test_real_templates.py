"""Chat templates of real models times real tokenizers times conversations: tokens are those of
inference.
"""

import unicodedata

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gold_trainer.data.dataset import RowDataset
from gold_trainer.rendering.collator import GOLDCollator
from gold_trainer.rendering.prompts import process_prompts
from support.chat_templates import (
    LITERALS,
    NUM_EXAMPLES,
    TOOL,
    templated,
    text_template_names,
)

NAMES = text_template_names()
# What these write around an answer is not what their generation prompts open.
OPEN_THOUGHTS = ("deepseek", "nemotron", "qwen3_5_nothink")
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(LITERALS),
        st.sampled_from([" ", "\n", "\n\n", "  ", "\t", "", "A red bar.", "2 + 2 = 4", "{}"]),
        st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co", "Cc"]), max_size=8),
    ),
    max_size=5,
).map(lambda parts: unicodedata.normalize("NFC", "".join(parts)))
THOUGHTS = st.one_of(st.none(), TEXTS.filter(str.strip))
CALL = {"name": "weather", "arguments": {"city": "Ulm"}}
pytestmark = pytest.mark.skipif(not NAMES, reason="templates come with trl, of the extra dev")


@pytest.mark.parametrize("tokenizer_name", ["qwen", "gpt2", "tekken"])
@settings(
    max_examples=NUM_EXAMPLES or 40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(
    name=st.sampled_from(NAMES or [""]),
    question=st.sampled_from(["What?", "<|im_end|> ?", "caf\u00e9 \u65e5"]),
    content=TEXTS,
    thoughts=THOUGHTS,
    tools=st.sampled_from([None, [TOOL]]),
)
def test_prompt_and_answer_are_the_rendered_conversation(
    tokenizer_name, name, question, content, thoughts, tools
):
    tokenizer = templated(name, tokenizer_name)
    user = {"role": "user", "content": question}
    answer = {"role": "assistant", "content": content}
    if thoughts is not None:
        answer["reasoning_content"] = thoughts
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], None)
    columns = {"messages": [user, answer], "tools": tools}
    row = RowDataset([columns], needs_completion=True, is_text=True)[0]
    rendered = tokenizer.apply_chat_template([user, answer], tools=tools, tokenize=False)
    expected = tokenizer.apply_chat_template(
        [user], tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    generation_prompt = tokenizer.apply_chat_template(
        [user], tools=tools, add_generation_prompt=True, tokenize=False
    )
    is_open = name.startswith(OPEN_THOUGHTS)
    assume(rendered.startswith(generation_prompt) or is_open)
    example = collator.example(row)

    prompts = [
        process_prompts(tokenizer, [e.prompt_text], [[]], [e.adds_special_tokens])["input_ids"]
        for e in (example, example.unanswered())
    ]
    assert prompts[1][0].tolist() == expected
    if not is_open:
        assert example.prompt_text == generation_prompt
    # byte for byte, up to the template's end of turn or the one that is added
    text = example.prompt_text + tokenizer.decode(example.written_ids)
    last = example.written_ids[-1]
    assert last in collator.end_ids
    if not rendered.startswith(text):
        assert text.removesuffix(tokenizer.decode([last])) == rendered
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = [i for i in example.written_ids if i in collator.end_ids]
    assert ends == [last] and last in special


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("others", [{"content": None}, {"content": ""}, {"content": "Wait."}])
@pytest.mark.parametrize("thoughts", [{}, {"reasoning_content": "hm"}])
def test_a_call_of_tools_is_learnt_wherever_the_template_writes_it(name, others, thoughts):
    tokenizer = templated(name, "gpt2")
    call = {"id": "callcall1", "type": "function", "function": CALL}
    messages = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", **others, **thoughts, "tool_calls": [call]},
    ]
    try:
        rendered = tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False)
    except Exception as error:  # of the template: it takes no such turn
        pytest.skip(str(error))
    if "Ulm" not in rendered:
        pytest.skip("the template does not write calls of such a turn")
    columns = {"messages": messages, "tools": [TOOL]}
    row = RowDataset([columns], needs_completion=True, is_text=True)[0]
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], None)
    example = collator.example(row)
    completion = tokenizer.decode(example.written_ids)
    assert "Ulm" in completion and example.written_ids[-1] in collator.end_ids
    end = tokenizer.decode(example.written_ids[-1:])
    assert rendered.startswith(example.prompt_text + completion.removesuffix(end))

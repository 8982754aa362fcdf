"""What a chat template would leave out of a row in silence is refused, or said, by name."""

import pytest
from transformers.utils.logging import warning_once

from gold_trainer.data.dataset import RowDataset
from gold_trainer.rendering.collator import GOLDCollator
from support.chat_templates import template_names, templated
from support.tiny_models import tiny_processor

pytestmark = pytest.mark.skipif(not template_names(), reason="templates come with trl")
USER = {"role": "user", "content": ' "What" <is>\n\tthat & caf\u00e9? '}
ANSWER = {"role": "assistant", "content": "A bar."}
SYSTEM = {"role": "system", "content": "Be brief.\n- 'please'"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "look", "arguments": {"a": 1}}}
ASKED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOLD = {"role": "tool", "content": '{"seen": "caf\u00e9 bars"}', "tool_call_id": "abcdefghi"}
TOOL = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}


def example_of(name, messages, **columns):
    tokenizer = templated(name, "qwen") if name in template_names() else tiny_processor(name)
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], None)
    rows = [{"messages": messages} | columns]
    return collator.example(RowDataset(rows, needs_completion=True, is_text=True)[0])


@pytest.mark.parametrize(
    ("name", "messages", "lost"),
    [
        (
            "qwen3",
            [{"role": "developer", "content": "Be brief."}, USER, ANSWER],
            r"0, .* 'developer'.* \(system, user\)",
        ),
        ("phi3", [USER, ASKED, TOLD, ANSWER], r"2, of the role 'tool'.* \(user\)"),
        (
            "deepseek_r1_distill",
            [SYSTEM, SYSTEM | {"content": "Now."}, USER, ANSWER],
            "0, .* 'system'",
        ),
        (
            "gptoss",
            [SYSTEM, SYSTEM | {"content": "Now."}, USER, ANSWER],
            r"1, .* 'system'.* \(user\)",
        ),
        ("phi3", [USER, ASKED, TOLD | {"role": "ipython"}, ANSWER], r"2, .* 'ipython'.* \(tool\)"),
    ],
)
def test_a_turn_that_the_template_leaves_out_names_row_and_message(name, messages, lost):
    with pytest.raises(ValueError, match=rf"^row 0: the chat template leaves out message {lost}"):
        example_of(name, messages)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gptoss", "deepseekv3", "muse_glimmer"])
@pytest.mark.parametrize(("role", "key"), [("tool", "result"), ("assistant", "say")])
def test_a_turn_without_content_that_the_template_does_not_read_is_refused(name, role, key):
    turn = {"role": role, key: "What?"}
    with pytest.raises(
        ValueError, match=rf"message 1, of the role '{role}': it reads nothing of {key}; write"
    ):
        example_of(name, [USER, turn, USER, ANSWER])


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("name", ["gptoss", "qwen3", "gemma4", "glm4moe", "qwen2_5", "deepseekv3"])
def test_a_turn_of_thoughts_alone_is_taken_as_the_template_writes_it(name, key):
    thought = {"role": "assistant", "content": None, key: "Hm."}
    assert example_of(name, [USER, thought, USER, ANSWER]).written_ids


def test_two_answers_in_a_row_are_to_be_merged():
    with pytest.raises(ValueError, match=r"^row 0: .*; merge the answer with message 1, of the a"):
        example_of("qwen3", [USER, ANSWER, ANSWER])


@pytest.mark.parametrize("content", ["", [], [{"type": "text", "text": ""}]])
def test_an_empty_answer_is_one_however_it_is_written(content):
    said = example_of("qwen2_5", [USER, ANSWER | {"content": content}])
    assert said.written_ids == example_of("qwen2_5", [USER, ANSWER | {"content": ""}]).written_ids


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma4", "glm4moe", "nemotron_3_nano"])
def test_turns_that_the_template_trims_or_writes_as_json_are_not_lost(name):
    messages = [SYSTEM, USER, ASKED, TOLD, ANSWER, USER, ANSWER]
    assert example_of(name, messages, tools=[TOOL]).written_ids


def test_tools_that_the_template_does_not_know_are_said_once(caplog):
    warning_once.cache_clear()
    for _ in range(2):
        example_of("llama", [USER, ANSWER], tools=[TOOL])
    (record,) = caplog.records
    assert "the chat template reads nothing of tools, keys of rows" in record.getMessage()
    assert "look" in example_of("qwen3", [USER, ANSWER], tools=[TOOL]).prompt_text
    assert len(caplog.records) == 1


def test_keys_that_the_template_does_not_read_are_said_once(caplog):
    warning_once.cache_clear()
    answer = ANSWER | {"mood": "calm", "reasoning_content": "Hm."}
    for _ in range(2):
        example_of("llama3_1", [USER | {"name": "Ann"}, answer], chat_template_kwargs={"deep": 1})
    (record,) = caplog.records
    assert "reads nothing of deep, mood, reasoning_content, keys of" in record.getMessage()
    warning_once.cache_clear()
    example_of("qwen3", [USER, ANSWER | {"reasoning_content": "Hm."}])
    assert len(caplog.records) == 1


def test_words_of_a_template_are_not_keys_that_it_reads(caplog):
    """Its text speaks of a description and of parameters, which are those of tools."""
    warning_once.cache_clear()
    answer = ANSWER | {"description": "A look.", "parameters": "None."}
    example_of("llama3_1", [USER, answer], tools=[TOOL])
    example_of("glm4moe", [USER, ANSWER | {"name": "Ann", "function": "look"}])
    first, second = (record.getMessage() for record in caplog.records)
    assert "reads nothing of description, parameters, keys of" in first
    assert "reads nothing of function, keys of" in second


def test_keys_of_the_configuration_that_the_template_does_not_read_are_said(caplog):
    warning_once.cache_clear()
    tokenizer = templated("qwen3", "qwen")
    fields = {"enable_thinking": False, "reasoning_effort": "low"}
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], None, (), fields)
    rows = RowDataset([{"messages": [USER, ANSWER]}], needs_completion=True, is_text=True)
    collator.example(rows[0])
    (record,) = caplog.records
    assert "the chat template reads nothing of reasoning_effort, keys of" in record.getMessage()

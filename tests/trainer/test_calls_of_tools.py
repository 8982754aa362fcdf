"""Calls of tools however data write them: the template gets them in the form that it takes."""

import json

import pytest

from gold_trainer.data.dataset import RowDataset
from gold_trainer.rendering.collator import GOLDCollator
from support.chat_templates import TOOL, templated, text_template_names

USER = {"role": "user", "content": "Weather in Ulm?"}
ANSWER = {"role": "assistant", "content": "Rain."}
FUNCTION = {"name": "weather", "arguments": {"city": "Ulm"}}
RESULT = {"role": "tool", "content": "rain", "tool_call_id": "abcdefghi", "name": "weather"}
NO_CALLS = ("cohere", "deepseek_r1", "gemma", "gemma3", "lfm2", "phi3", "qwen2_5_vl", "qwen3_vl")


def asking(arguments, **others):
    function = {"name": "weather", "arguments": arguments}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]} | others


def learnt(name, messages, **columns):
    """The text of the prompt, and of what is learnt."""
    if name not in text_template_names():
        pytest.skip("chat templates of trl")
    tokenizer = templated(name, "qwen")
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], 2048)
    rows = [{"messages": messages, "tools": [TOOL], **columns}]
    row = RowDataset(rows, needs_completion=True, is_text=True)[0]
    example = collator.example(row)
    return example.prompt_text, tokenizer.decode(example.completion_ids)


@pytest.mark.parametrize(
    "name", [n for n in text_template_names() if not n.startswith(NO_CALLS)] or ["-"]
)
def test_arguments_as_json_are_rendered_as_the_object_is(name):
    as_object = learnt(name, [USER, asking({"city": "Ulm"}), RESULT, ANSWER])
    assert "Ulm" in as_object[0].partition("Ulm?")[2]
    assert learnt(name, [USER, asking('{"city": "Ulm"}'), RESULT, ANSWER]) == as_object
    called = learnt(name, [USER, asking({"city": "Ulm"})])
    assert learnt(name, [USER, asking('{"city": "Ulm"}', content=None)]) == called


@pytest.mark.parametrize(
    "name", [n for n in text_template_names() if not n.startswith(NO_CALLS)] or ["-"]
)
@pytest.mark.parametrize("tool", [TOOL, {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_a_function_alone_changes_nothing_of_the_tools_in_its_prompt(name, tool):
    alone = {"role": "assistant", "tool_calls": [FUNCTION]}
    called = learnt(name, [USER, asking({"city": "Ulm"})], tools=[tool])
    said = learnt(name, [USER, alone], tools=[tool])
    assert said[0] == called[0] and "Ulm" in said[1]


@pytest.mark.parametrize("name", ["deepseekv3", "gemma4", "gptoss", "llama3_1", "qwen2_5", "qwen3"])
def test_a_message_that_repeats_the_arguments_as_python_writes_them_changes_no_call(name):
    call, texts = asking({"city": "Ulm"}), ("Weather in Ulm? {'city': 'Ulm'}", "Weather in Ulm? {}")
    prompts = [learnt(name, [USER | {"content": t}, call, RESULT, ANSWER])[0] for t in texts]
    assert prompts[0].replace("{'city': 'Ulm'}", "{}") == prompts[1]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("qwen3", '{"name": "weather", "arguments": {"city":"Ulm"}}'),  # takes JSON as it stands
        ("deepseekv3", '```json\n{"city":"Ulm"}\n```'),  # takes JSON alone
        ("qwen2_5", '{"name": "weather", "arguments": {"city": "Ulm"}}'),  # quotes a text
        ("gemma4", '{city:<|"|>Ulm<|"|>}'),  # writes a text in braces of its own
        ("glm4moe", "<arg_key>city</arg_key>"),  # refuses a text
    ],
)
def test_json_stays_as_it_is_written_where_the_template_takes_it(name, written):
    assert written in learnt(name, [USER, asking('{"city":"Ulm"}')])[1]


@pytest.mark.parametrize("key", ["parameters", "input", "args"])
@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gptoss", "gemma4", "deepseekv3"])
def test_arguments_under_another_name_are_those_of_the_call(name, is_whole, key):
    """They were lost: a call without arguments has none."""
    function = {"name": "weather", key: {"city": "Ulm"}, "arguments": None}
    call = {"id": "abcdefghi", "type": "function", "function": function} if is_whole else function
    said = learnt(name, [USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert said == learnt(name, [USER, asking({"city": "Ulm"})])
    caller = {"role": "tool_call", "content": json.dumps({"name": "weather", key: {"city": "Ulm"}})}
    assert learnt(name, [USER, caller]) == said
    twice = {"name": "weather", "arguments": {"city": "Ulm"}, key: {"city": "Bonn"}}
    with pytest.raises(ValueError, match=f"^row 0: a call must have its arguments once.* {key} in"):
        learnt(name, [USER, {"role": "assistant", "content": "", "tool_calls": [twice]}])


@pytest.mark.parametrize("empty", [None, "", "{}", {}])
@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "glm4moe", "deepseekv3", "gptoss"])
def test_no_arguments_are_an_empty_object(name, empty):
    assert learnt(name, [USER, asking(empty)]) == learnt(name, [USER, asking({})])


def test_a_template_that_writes_objects_as_python_does_gets_json():
    tokenizer = templated("qwen3", "qwen")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    collator = GOLDCollator(tokenizer, [tokenizer.eos_token_id], 2048)
    rows = [{"messages": [USER, asking(a)]} for a in ({"city": "Ulm"}, '{"city": "Ulm"}')]
    for row in RowDataset(rows, needs_completion=True, is_text=True):
        example = collator.example(row)
        assert tokenizer.decode(example.completion_ids) == '{"city": "Ulm"}<|im_end|>'


def test_functions_alone_are_wrapped_where_the_template_asks_for_it():
    whole = learnt("gptoss", [USER, ANSWER])
    assert learnt("gptoss", [USER, ANSWER], tools=[TOOL["function"]]) == whole
    flat = asking({}) | {"tool_calls": [FUNCTION]}
    assert learnt("deepseekv3", [USER, flat]) == learnt(
        "deepseekv3", [USER, asking({"city": "Ulm"})]
    )
    assert '{"name": "weather"' in learnt("qwen3", [USER, ANSWER], tools=[TOOL["function"]])[0]
    parameters = {"input_schema": TOOL["function"]["parameters"]}
    of_anthropic = {"name": "weather", "description": "Tells it."} | parameters
    assert learnt("gptoss", [USER, ANSWER], tools=[of_anthropic]) == whole


@pytest.mark.parametrize("name", ["gptoss", "gemma4", "muse_glimmer", "qwen3"])
def test_a_tool_needs_no_description_and_no_parameters(name):
    bare = {"type": "function", "function": {"name": "weather"}}
    prompt, said = learnt(name, [USER, ANSWER], tools=[bare])
    assert "weather" in prompt and "Rain." in said


CALLER = json.dumps(FUNCTION)


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "tool_call", "content": CALLER}, {"role": "tool_response", "content": "rain"}],
        [{"role": "function-call", "content": CALLER}, {"role": "tool", "content": "rain"}],
        [{"from": "function_call", "value": CALLER}, {"from": "observation", "value": "rain"}],
        [{"from": "tool_call", "value": CALLER}, {"from": "function-response", "value": "rain"}],
        [
            {"role": "assistant", "content": None, "function_call": FUNCTION},
            {"role": "function", "name": "weather", "content": "rain"},
        ],
    ],
)
def test_calls_and_results_in_the_words_of_other_projects(turns):
    columns = {"conversations": [USER, *turns, ANSWER]}
    prompt = RowDataset([columns], needs_completion=True, is_text=True)[0].prompt
    (call,) = prompt[1]["tool_calls"]
    assert (prompt[1]["role"], prompt[1]["content"]) == ("assistant", None)
    assert call == {"type": "function", "function": FUNCTION}
    assert (prompt[2]["role"], prompt[2]["content"]) == ("tool", "rain")


def test_calls_of_one_turn_are_one_message():
    calls = [{"role": "tool_call", "content": CALLER}] * 2
    said = {"role": "assistant", "content": "I look."}
    results = [{"role": "tool_response", "content": "rain"}] * 2
    columns = {"messages": [USER, said, *calls, *results, ANSWER]}
    prompt = RowDataset([columns], needs_completion=True, is_text=True)[0].prompt
    assert [message["role"] for message in prompt] == ["user", "assistant", "tool", "tool"]
    assert prompt[1]["content"] == "I look." and len(prompt[1]["tool_calls"]) == 2
    last = RowDataset([{"messages": [USER, *calls]}], needs_completion=True, is_text=True)[0]
    assert last.prompt == [USER] and len(last.answer["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "tool_call", "content": "look it up"}, "a tool_call must be JSON with name"),
        ({"role": "tool_call", "content": "[]"}, "a tool_call must be JSON with name"),
        ({"role": "assistant", "content": "", "function_call": 3}, "function_call must hold name"),
        (asking({}, function_call=FUNCTION), "function_call must hold name and arguments, beside"),
    ],
)
def test_calls_that_mean_nothing_are_refused(message, said):
    with pytest.raises(ValueError, match=f"^row 0: {said}.*; write it as "):
        RowDataset([{"messages": [USER, message]}], needs_completion=True, is_text=True)[0]


def test_a_result_in_a_role_that_the_template_leaves_out_is_told_of_tool():
    turns = [USER, asking({"city": "Ulm"}), RESULT | {"role": "observation"}, ANSWER]
    with pytest.raises(ValueError, match=r"leaves out message 2, .* knows \(tool\), or drop"):
        learnt("qwen3", turns)

"""What a chat template reads is told from its syntax tree, not from the words in its text."""

from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from gold_trainer.rendering.template_keys import keys_read
from support.chat_templates import TOOL, template_folder

FOLDER = template_folder()
PATHS = sorted(FOLDER.glob("*.jinja")) if FOLDER else []
EACH = "{% for message in messages %}{{ message.role }}{{ message.content }}"
END = "{% endfor %}"
KEYS = {"mood", "note", "description"}


def unread(body: str, variables: tuple[str, ...] = ()) -> set[str]:
    return keys_read(EACH + body + END).unread(KEYS, variables)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{# mood, note, description #}",
        "mood note description {{ 'mood note description' }}",
        "{% for tool in tools %}{{ tool.mood }}{{ tool['note'] }}{{ tool | tojson }}{% endfor %}",
        "{% for message in tools %}{{ message | tojson }}{{ message.mood }}{% endfor %}",
        "{{ message.content.mood }}{{ message.tool_calls[0]['note'] }}{{ mood }}{{ message.Mood }}",
        "{% for call in message.tool_calls %}{{ call | tojson }}{{ call.items() }}{% endfor %}",
        "{% set ns = namespace(note=1, mood=2) %}{{ ns.note }}{{ ns.mood }}",
        "{% macro show(note) %}{{ note.mood }}{% endmacro %}{{ show(message.content) }}",
        "{% for key in ['role', 'name'] %}{{ message[key] }}{% endfor %}",
        "{% if messages | length > 1 and messages[1:][0].role == 'note' %}a{% endif %}",
        "{{ messages | selectattr('role', 'equalto', 'mood') | map(attribute='content') | join }}",
    ],
)
def test_words_that_are_no_key_of_a_message_are_unread(body):
    assert unread(body) == KEYS


@pytest.mark.parametrize(
    "body",
    [
        "{{ message.mood }}",
        "{{ message['mood'] | default('') }}",
        "{{ message.get('mood', '') }}",
        "{% if 'mood' in message %}calm{% endif %}",
        "{% if message.mood is defined %}calm{% endif %}",
        "{% set key = 'mood' %}{{ message[key] }}",
        "{% for key in ['role', 'mood'] %}{{ message[key] }}{% endfor %}",
        "{{ messages[loop.index0].mood }}{{ messages[-1].content }}",
        "{{ loop.previtem.mood }}",
        "{% set last = messages | last %}{{ last.mood }}",
        "{% set rest = messages[1:] %}{% for other in rest %}{{ other.mood }}{% endfor %}",
        "{% set ns = namespace(it=none) %}{% set ns.it = message %}{{ ns.it.mood }}",
        "{% set ns = namespace(it=message) %}{{ ns.it.mood }}",
        "{{ show(message) }}{% macro show(it) %}{{ it.mood }}{% endmacro %}",
        "{% macro show(it) %}{{ it.mood }}{% endmacro %}{{ show(it=message) }}",
        "{% macro a(it) %}{{ b(it) }}{% endmacro %}{% macro b(x) %}{{ x.mood }}{% endmacro %}"
        "{{ a(message) }}",
        "{% with it = message %}{{ it.mood }}{% endwith %}",
        "{% set copy = dict(message, content='') %}{{ copy.mood }}",
        "{{ (message if loop.first else messages[0]).mood }}",
        "{{ messages | map(attribute='mood') | join }}",
        "{{ messages | selectattr('mood', 'defined') | list | length }}",
        "{% for other in [message] + messages %}{{ other.mood }}{% endfor %}",
        "{% generation %}{{ message.mood }}{% endgeneration %}{% continue %}",
        "{% filter upper %}{{ message.mood }}{% endfilter %}",
        "{% set text %}{{ message.mood }}{% endset %}{{ text }}",
        "{% for place, it in [(0, message)] %}{{ it.mood }}{% endfor %}",
    ],
)
def test_a_key_that_is_read_off_a_message_is_read(body):
    assert unread(body) == KEYS - {"mood"}


@pytest.mark.parametrize(
    "body",
    [
        "{% for key in message %}{{ message[key] }}{% endfor %}",
        "{% for key, value in message.items() %}{{ key }}{{ value }}{% endfor %}",
        "{% for key, value in message | items %}{{ key }}{{ value }}{% endfor %}",
        "{{ message[name] }}",
        "{{ message.get('mo' + 'od') }}",
        "{{ message['mo' ~ 'od'] }}",
        "{{ message | tojson }}",
        "{{ messages }}",
        "{{ show(message) }}",
        "{{ dict(it=message) }}",
        "{% set ns = {'it': message} %}{{ ns.it.mood }}",
        "{% macro show() %}{{ varargs }}{% endmacro %}{{ show(message) }}",
        "{% macro show() %}{{ kwargs }}{% endmacro %}{{ show(it=message) }}",
        "{% for group in messages | groupby('role') %}{{ group }}{% endfor %}",
        "{% set all = [[[[[message]]]]] %}{{ all }}",
    ],
)
def test_a_message_that_goes_out_of_sight_is_read_with_all_its_keys(body):
    assert unread(body) == set()


def test_variables_are_those_that_the_template_looks_up():
    body = "{% if deep is defined %}{{ deep }}{% endif %}{{ message.tools }}{# high #}{{ 'low' }}"
    assert unread(body, ("deep", "tools", "high", "low")) == KEYS | {"tools", "high", "low"}


@pytest.mark.parametrize(
    ("body", "is_read"),
    [
        ("{% if deep %}{% set mode = 1 %}{% else %}{% set mode = 2 %}{% endif %}{{ mode }}", False),
        (
            "{% if deep %}{% set mode = 1 %}{% elif low %}{% set mode = 2 %}{% endif %}{{ mode }}",
            True,
        ),
        ("{% if mode %}{% set mode = 1 %}{% else %}{% set mode = 2 %}{% endif %}", True),
        ("{% if deep %}{% set mode = mode %}{% else %}{% set mode = 2 %}{% endif %}", True),
        ("{{ mode }}{% if deep %}{% set mode = 1 %}{% else %}{% set mode = 2 %}{% endif %}", True),
        (
            "{% if deep %}{% if low %}{% set mode = 1 %}{% else %}{% set mode = 2 %}{% endif %}"
            "{% else %}{% set mode %}3{% endset %}{% endif %}{{ mode }}",
            False,
        ),
        ("{% set mode = mode | default(1) %}", True),
        ("{% if mode is not defined %}{% set mode = 1 %}{% endif %}{{ mode }}", True),
    ],
)
def test_a_variable_that_the_template_sets_in_any_case_is_unread(body, is_read):
    assert unread(body, ("mode",)) == (KEYS if is_read else KEYS | {"mode"})


def test_of_several_templates_the_one_in_use_is_asked():
    both = {"default": EACH + END, "tool_use": EACH + "{{ message.mood }}" + END}
    assert keys_read(both).unread({"mood"}, ()) == {"mood"}
    assert keys_read(both, has_tools=True).unread({"mood"}, ()) == set()


def test_what_is_no_template_of_jinja_may_read_anything():
    read = keys_read("{% mood")
    assert read.unread(KEYS, ["tools"]) == set() and read.reads_any(["note"])


class Watched(dict):
    """A message that notes which of its keys are asked for."""

    asked: set[str]

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)


CALL = {"id": "a", "type": "function", "function": {"name": "look", "arguments": {"a": 1}}}
CONVERSATIONS = [
    [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A bar."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "Hm."},
        {"role": "tool", "content": "{}", "tool_call_id": "a", "name": "look"},
        {"role": "assistant", "content": "A bar.", "thinking": "Hm."},
    ],
]


@pytest.mark.skipif(not PATHS, reason="templates come with trl")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_real_templates_ask_messages_for_no_key_beside_those(path: Path):
    source = path.read_text(encoding="utf-8")
    read = keys_read(source)
    assert not read.has_all and {"role", "content"} <= read.of_messages
    compiled, asked = _compile_jinja_template(source), set()
    for conversation in CONVERSATIONS:
        for length in range(1, len(conversation) + 1):
            messages = [Watched(message) for message in conversation[:length]]
            for message in messages:
                message.asked = asked
            try:
                compiled.render(messages=messages, tools=[TOOL], bos_token="", eos_token="")
            except Exception:  # it refuses the conversation after what it has asked
                continue
    assert {"role", "content"} <= asked
    assert asked <= read.of_messages, asked - read.of_messages

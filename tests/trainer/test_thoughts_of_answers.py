"""Thoughts of an answer are learnt wherever their author put them, or told not to be."""

import pytest

from gold_trainer.data.dataset import RowDataset
from gold_trainer.rendering.collator import GOLDCollator
from support.chat_templates import templated, text_template_names
from support.tiny_models import tiny_processor

USER = {"role": "user", "content": "Weather in Ulm?"}
ANSWER = {"role": "assistant", "content": "Rain."}


def read(**columns):
    return RowDataset([columns], needs_completion=True, is_text=True)[0]


def learnt(name, **columns):
    """The end of the prompt, and what is learnt."""
    if name not in text_template_names():
        pytest.skip("chat templates of trl")
    tokenizer = templated(name, "qwen")
    example = GOLDCollator(tokenizer, [tokenizer.eos_token_id], 2048).example(read(**columns))
    return example.prompt_text.partition("Ulm?")[2], tokenizer.decode(example.completion_ids)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize(
    "parts",
    [["h", "m"], [{"type": "text", "text": "hm"}], [{"type": "thinking", "thinking": "hm"}]],
)
def test_parts_under_a_key_of_thoughts_are_their_text(key, parts):
    assert read(messages=[USER, ANSWER | {key: parts}]).answer[key] == "hm"
    assert "<think>\nhm\n</think>" in learnt("qwen3", messages=[USER, ANSWER | {key: parts}])[1]


@pytest.mark.parametrize("thoughts", [{"content": "hm"}, 3, True, [3], [{"type": "image"}]])
def test_thoughts_that_are_no_text_are_refused(thoughts):
    with pytest.raises(ValueError, match=r"^row 0: reasoning of a message must be text, got "):
        read(messages=[USER, ANSWER | {"reasoning": thoughts}])
    # what such a key says in another turn is its template's business
    assert read(messages=[USER | {"thinking": True}, ANSWER]).prompt[0]["thinking"] is True


@pytest.mark.parametrize("nothing", [False, {}, [], "", None])
def test_a_key_of_thoughts_that_holds_nothing_is_none(nothing):
    assert not read(messages=[USER, ANSWER | {"thinking": nothing}]).answer.get("thinking")


def test_inline_thoughts_that_the_template_drops_are_told(caplog):
    said = ANSWER | {"content": "<think>hm</think>Rain."}
    assert "hm" not in learnt("deepseek_r1_distill", messages=[USER, said])[1]
    assert "row 0: the chat template does not write the answer's reasoning_content" in caplog.text


def test_part_of_a_content_that_the_template_drops_is_told(caplog):
    said = ANSWER | {"content": "<think>a</think>Maybe.<think>b</think>Rain."}
    assert "Maybe" not in learnt("qwen3", messages=[USER, said])[1]
    assert "does not write all of the answer's content, 'Maybe' among it" in caplog.text


def test_inline_thoughts_reach_a_template_that_takes_them_under_their_key_alone():
    keyed = learnt("nemotron_3_nano", messages=[USER, ANSWER | {"reasoning_content": "hm"}])
    said = ANSWER | {"content": "<think>hm</think>Rain."}
    assert learnt("nemotron_3_nano", messages=[USER, said]) == keyed
    assert keyed == (
        "<|im_end|>\n<|im_start|>assistant\n<think>\n",
        "hm\n</think>\nRain.<|im_end|>",
    )


def test_a_prompt_may_end_with_thoughts_alone():
    begun = {"role": "assistant", "content": None, "reasoning_content": "hm"}
    prompt, answer = learnt("qwen3", prompt=[USER, begun], completion="Rain.")
    assert prompt.endswith("<think>\nhm\n</think>\n\n") and answer == "Rain.<|im_end|>"


@pytest.mark.parametrize("name", ["nemotron_3_nano", "deepseek_r1_distill", "qwen3", "qwen3_6"])
def test_characters_for_private_use_are_text(name):
    """Fonts of symbols leave them in texts that come from PDF files."""
    text = "\ue000 \uf0b7 \ue001"
    answer = ANSWER | {"content": f"Rain {text}."}
    user = USER | {"content": f"{text} Weather in Ulm?"}
    prompt, said = learnt(name, messages=[user, answer])
    assert f"Rain {text}." in said
    plain = learnt(name, messages=[USER, ANSWER])
    assert (prompt, said.replace(f" {text}", "")) == plain
    developer = {"role": "developer", "content": "Be brief."}
    with pytest.raises(ValueError, match=r"leaves out message 0, of the role .developer."):
        learnt("qwen3", messages=[developer, user, answer])


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_parts_of_an_answer_are_one_text(family):
    source = "gemma3" if family == "gemma3" else "qwen3_vl"
    if source not in text_template_names():
        pytest.skip("chat templates of trl")
    processor = tiny_processor(family)
    processor.chat_template = templated(source, "qwen").chat_template
    collator = GOLDCollator(processor, [processor.tokenizer.eos_token_id], 2048)
    parts = [{"type": "text", "text": text} for text in ("It ", "rains", " again.")]
    columns = {"messages": [USER, ANSWER | {"content": parts}]}
    row = RowDataset([columns], needs_completion=True, is_text=False)[0]
    example = collator.example(row)
    assert processor.tokenizer.decode(example.completion_ids).startswith("It rains again.<")
    assert [piece.text for piece in example.pieces if piece.key] == ["It rains again."]

"""A conversation in the words of a chat template: the text that a model is prompted with, and what
follows it.

What follows is made of pieces: text of the answer, and marks that the template writes around it. To
tell them apart the template is rendered once more with a private character in the place of each of
the answer's texts. Special tokens are looked for in marks only: in an answer they are text.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from gold_trainer.data.calls import CALLS
from gold_trainer.data.messages import Messages, continued, joined_text
from gold_trainer.data.row_errors import TemplateError, told
from gold_trainer.data.rows import Row
from gold_trainer.data.thoughts import THOUGHT_KEYS
from gold_trainer.rendering.calls import has_forms, rendered_in_form
from gold_trainer.rendering.frames import (
    CLOSE,
    CONTENT,
    OPENED,
    THOUGHTS,
    Frame,
    Frames,
    Piece,
    common_length,
    of_one_kind,
    read_as_thoughts,
    texts_of,
    with_inline_thoughts,
    without_inline_thoughts,
)
from gold_trainer.rendering.template_keys import keys_read

logger = logging.get_logger(__name__)

Processor = ProcessorMixin | PreTrainedTokenizerBase
KNOWN_ROLES = ("system", "user", "assistant")  # of every template
PRIVATE = range(0xE000, 0xF900)  # characters that no template looks for, and none trims


class Renderer:
    """Renders conversations with the chat template of a processor or a tokenizer."""

    def __init__(
        self,
        processor: Processor,
        template_kwargs: Mapping[str, Any],  # of all rows; a row's own win
    ):
        self.processor, self.template_kwargs = processor, template_kwargs
        self.is_vlm = isinstance(processor, ProcessorMixin)
        self.warned: set[str] = set()  # keys that the template does not write

    def prompt(self, row: Row) -> str:
        """The text that the model is prompted with."""
        if row.is_prefill:
            return self._template(row, _turns(row), continue_final_message=True)
        return self._template(row, _turns(row), add_generation_prompt=True)

    def frame(
        self, row: Row, answer: Mapping[str, Any], prompt: str, kinds: Collection[str]
    ) -> Frame | None:
        """What is written around the texts of these kinds of an answer; None where the template
        writes one of them twice.

        The prompt of a frame is the generation prompt, unless the template opens there what it does
        not write around such an answer (thoughts, of which it has none): then it is what the
        template writes before the answer.
        """
        probes = dict(zip(probes_beside(prompt, *texts_of(answer).values()), kinds, strict=False))
        rendered = self._answered(row, _probed(answer, probes))
        places = sorted((rendered.find(probe), probe) for probe in probes if probe in rendered)
        if any(rendered.count(probe) != 1 for _, probe in places):
            return None
        start = len(prompt)
        if not rendered.startswith(prompt):
            common = common_length(prompt, rendered)
            if not places or common < self._length_before_answer(row, prompt):
                raise _rewritten(row, prompt, rendered)
            start = places[0][0]
        ends = [start, *(place + 1 for place, _ in places)]
        marks = [
            rendered[begin:end]
            for begin, end in zip(ends, [*(place for place, _ in places), None], strict=True)
        ]
        return Frame(rendered[:start], tuple(probes[probe] for _, probe in places), tuple(marks))

    def frames(self, row: Row, prompt: str) -> Frames:
        """What is written around an answer that is not known yet."""
        answer = {"role": "assistant", CONTENT: "answer"}
        plain = self.frame(row, answer, prompt, [CONTENT])
        both = self._readable(row, {**answer, THOUGHTS: "thoughts"})
        try:
            thinking = self.frame(row, both, prompt, [THOUGHTS, CONTENT])
        except ValueError:  # a template may refuse thoughts
            thinking = None
        if thinking is None or thinking.keys != (THOUGHTS, CONTENT):
            # The model writes thoughts that its template shows to nobody, as R1-Distill does.
            thinking = None
            if plain is not None and OPENED.search(prompt):
                thinking = Frame(prompt, (THOUGHTS, CONTENT), ("", CLOSE, plain.marks[-1]))
        return Frames(prompt, plain, thinking)

    def answered(self, row: Row, answer: Mapping[str, Any]) -> tuple[str, list[Piece]]:
        """The prompt and what follows it in the answered conversation."""
        prompt, answer = self.prompt(row), self._readable(row, of_one_kind(_of_one_text(answer)))
        rendered = self._answered(row, answer)
        content = joined_text(answer.get(CONTENT))
        has_content = content or (content == "" and not answer.get(CALLS))
        if not has_content and self._says_nothing(row, rendered):
            raise ValueError(
                f"{row.where}: an answer must have a content, or what the chat template writes, "
                f"got None and {sorted(answer.keys() - {'role', 'content'})}, of which it writes "
                "nothing; write the answer as its content, or drop the row."
            )
        if answer.get(CONTENT) is None and not rendered.startswith(prompt):
            blank = {**answer, CONTENT: ""}  # whose place says where the marks around it end
            answer = blank if self._answered(row, blank) == rendered else answer
        end = ""
        inline = without_inline_thoughts(answer)
        for form in (answer, *inline):
            if form is not answer and self._answered(row, form) != rendered:
                continue
            texts = texts_of(form)
            # A template may write no marks around an empty content, beside calls of tools.
            for kinds in {tuple(texts): None, tuple(k for k in texts if texts[k]): None}:
                try:
                    frame = self.frame(row, form, prompt, kinds)
                except TemplateError:  # it takes no text where there is none, beside calls
                    if all(texts[kind] for kind in kinds):
                        raise
                    continue
                end = end or (frame.marks[-1] if frame is not None else "")
                if frame is None or not rendered.startswith(frame.prompt):
                    continue
                pieces = frame.cut(rendered[len(frame.prompt) :], texts)
                if pieces is not None and not frame.keys and texts and not answer.get(CALLS):
                    pieces = _around_nothing(rendered[len(frame.prompt) :], end)
                if pieces is not None:
                    self._warn_of_losses(row, form, rendered, frame, is_inline=form is not answer)
                    return frame.prompt, with_inline_thoughts(pieces)
        if not rendered.startswith(prompt):
            return self._with_keyed_thoughts(row, inline, _rewritten(row, prompt, rendered))
        completion = rendered[len(prompt) :]
        self._warn_of_lost_words(row, answer, completion)
        pieces = read_as_thoughts(completion, end, inline)
        if pieces is not None:
            return prompt, pieces
        if end and completion.endswith(end):
            return prompt, [Piece(completion[: -len(end)], True), Piece(end, True)]
        return prompt, [Piece(completion, True)]

    def _readable(self, row: Row, answer: dict[str, Any]) -> dict[str, Any]:
        """The answer with its thoughts under the key that the template reads."""
        if THOUGHTS not in answer:
            return answer
        probe = next(probes_beside(self.prompt(row), *texts_of(answer).values()))
        try:
            for key in THOUGHT_KEYS:
                if probe in self._answered(row, {**answer, THOUGHTS: "", key: probe}):
                    return {**answer, key: answer[THOUGHTS]}
        except ValueError:  # the answer itself is refused by name
            pass
        return answer

    def _with_keyed_thoughts(
        self, row: Row, inline: list[dict[str, Any]], refusal: TemplateError
    ) -> tuple[str, list[Piece]]:
        """For a template that takes thoughts under their key, and not as their author put them
        into the content."""
        for form in inline:
            prompt, pieces = self.answered(row, form)
            if any(piece.key == THOUGHTS for piece in pieces):
                return prompt, pieces
        raise refusal

    def _warn_of_lost_words(self, row: Row, answer: Mapping[str, Any], completion: str) -> None:
        words = re.findall(r"\w+", joined_text(answer.get(CONTENT)) or "")
        lost = next((word for word in words if word not in completion), None)
        if lost is not None and CONTENT not in self.warned:
            self.warned.add(CONTENT)
            logger.warning(
                "%s: the chat template does not write all of the answer's content, %r among it, so "
                "it is not learnt (of all rows the first is told)",
                *(row.where, lost[:80]),
            )

    def _warn_of_losses(
        self,
        row: Row,
        answer: Mapping[str, Any],
        rendered: str,
        frame: Frame,
        *,
        is_inline: bool,  # its author wrote the thoughts into the content
    ) -> None:
        """What an answer has and its template does not write is not learnt: that is said once."""
        lost = [kind for kind, text in texts_of(answer).items() if text and kind not in frame.keys]
        if answer.get(CALLS) and self._writes_no_calls(row, answer, rendered):
            lost.append(CALLS)
        read = keys_read(self.processor.chat_template, has_tools=bool(row.tools))
        names = {THOUGHTS: THOUGHT_KEYS, CALLS: (CALLS,), CONTENT: (CONTENT,)}
        for key in lost:
            # other keys of a message are told by name anyway
            is_told = not read.reads_any(names[key]) and not (is_inline and key == THOUGHTS)
            if not is_told and key not in self.warned:
                self.warned.add(key)
                logger.warning(
                    "%s: the chat template does not write the answer's %s, so it is not learnt (of "
                    "all rows the first is told)",
                    row.where,
                    key,
                )

    def _writes_no_calls(self, row: Row, answer: Mapping[str, Any], rendered: str) -> bool:
        others = {key: value for key, value in answer.items() if key != CALLS}
        try:
            return self._answered(row, {**others, CONTENT: others.get(CONTENT) or ""}) == rendered
        except ValueError:  # without calls the template refuses the turn
            return False

    def _answered(self, row: Row, answer: Mapping[str, Any]) -> str:
        if row.is_prefill:
            *turns, last = _turns(row)
            return self._template(row, [*turns, continued(last, answer)])
        return self._template(row, [*_turns(row), dict(answer)])

    def _says_nothing(self, row: Row, rendered: str) -> bool:
        """Whether an answer with nothing in it is rendered alike."""
        for content in ("", None):
            try:
                if rendered == self._answered(row, {"role": "assistant", "content": content}):
                    return True
            except ValueError:  # a template may refuse such a message
                pass
        return False

    def _length_before_answer(self, row: Row, prompt: str) -> int:
        """How much of the prompt is written whether or not an answer is to follow."""
        if row.is_prefill:
            return len(prompt)
        return common_length(prompt, self._template(row, _turns(row)))

    def _template(self, row: Row, messages: Messages, **options: Any) -> str:
        if self.processor.chat_template is None:
            raise TemplateError(
                f"{row.where}: a conversation needs a chat template, "
                f"{type(self.processor).__name__} has none; set its chat_template, or pass prompt "
                "and completion as plain text."
            )
        kwargs = {**self.template_kwargs, **row.chat_template_kwargs, **options}

        def render(messages: Messages, tools: list[Any] | None) -> Any:
            made = [self._message(message) for message in messages]
            return self.processor.apply_chat_template(made, tools=tools, tokenize=False, **kwargs)

        try:
            if has_forms(messages, row.tools):
                text = rendered_in_form(render, messages, row.tools)
            else:
                text = render(messages, row.tools)
        except Exception as error:  # templates raise errors of jinja2 and of their own
            roles = [message["role"] for message in messages]
            raise TemplateError(
                f"{row.where}: the chat template must take the conversation, got an error for "
                f"the turns {roles} ({told(error)}); {_remedy(roles)}, or pass a processor with "
                "another template."
            ) from error
        assert isinstance(text, str), "apply_chat_template tokenizes only where it is asked to"
        return text

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Contents as lists of parts for processors, as strings for tokenizers: what their
        templates expect.
        """
        content = message.get("content")
        if content is None:
            return dict(message)
        if self.is_vlm:
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            return {**message, "content": parts}
        return {**message, CONTENT: joined_text(content)}


def probes_beside(*texts: str) -> Iterator[str]:
    """Characters to stand for an answer's texts that stand in none of these."""
    return (chr(code) for code in PRIVATE if all(chr(code) not in text for text in texts))


def _remedy(roles: Sequence[str]) -> str:
    """What to do about turns that many a template refuses."""
    turns = [(i, role) for i, role in enumerate(roles) if role not in ("system", "developer")]
    for (i, role), (j, after) in pairwise(turns):
        if role == after and role in ("user", "assistant"):
            return f"merge the messages {i} and {j}, both of the {role}, into one"
    late = next((i for i, role in enumerate(roles) if role == "system" and i), None)
    if late is not None:
        return f"put what message {late}, of the system, says in front, or into a user's turn"
    if turns and turns[0][1] == "assistant":
        return f"begin with a user's turn, or leave out message {turns[0][0]}, of the assistant"
    if "system" in roles:
        return "write what the system's message says into the first user's turn"
    tool = next((i for i, role in enumerate(roles) if role not in KNOWN_ROLES), None)
    if tool is not None:
        return f"give message {tool}, of the role {roles[tool]!r}, another role, or drop the row"
    return "change the row"


def _turns(row: Row) -> Messages:
    assert not isinstance(row.prompt, str), "plain text meets no template"
    return row.prompt


def _around_nothing(completion: str, end: str) -> list[Piece]:
    """The marks around an empty content, where they are others than around a text."""
    num = len(completion) - len(end) * completion.endswith(end)
    return [
        Piece(completion[:num], True),
        Piece("", False, CONTENT),
        Piece(completion[num:], True),
    ]


def _of_one_text(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parts of an answer are one text: templates may trim each of them."""
    content = answer.get(CONTENT)
    if not isinstance(content, list) or len(content) < 2:
        return answer
    return {**answer, CONTENT: [{"type": "text", "text": joined_text(content)}]}


def _probed(answer: Mapping[str, Any], probes: Mapping[str, str]) -> dict[str, Any]:
    """The answer with a probe as each of its texts, thoughts under every key that they have."""
    keys = {CONTENT: (CONTENT,), THOUGHTS: THOUGHT_KEYS}
    probed = {key: probe for probe, kind in probes.items() for key in keys[kind] if key in answer}
    return {**answer, **probed}


def _rewritten(row: Row, prompt: str, rendered: str) -> TemplateError:
    remedy = "pass prompt and completion as plain text"
    if not row.is_prefill and _turns(row)[-1]["role"] == "assistant":
        remedy = f"merge the answer with message {len(row.prompt) - 1}, of the assistant too"
    return TemplateError(
        f"{row.where}: the chat template must render an answered conversation as the prompt "
        f"plus the answer, got {rendered[-80:]!r} after {prompt[-40:]!r}; {remedy}, or "
        "pass a processor with another template."
    )

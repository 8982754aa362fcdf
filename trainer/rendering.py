"""A conversation in the words of a chat template: the text that a model is prompted with, and what
follows it.

What follows is made of pieces: text of the answer, and marks that the template writes around it. To
tell them apart the template is rendered once more with a private character in the place of each of
the answer's texts. Special tokens are looked for in marks only: in an answer they are text.
"""

from collections.abc import Collection, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from gold_trainer.messages import Messages, continued
from gold_trainer.row_errors import TemplateError
from gold_trainer.rows import Row

Processor = ProcessorMixin | PreTrainedTokenizerBase
FIRST_PROBE = 0xE000  # of the private use area: no template looks for it, none trims it


class Piece(NamedTuple):
    """Part of what follows a prompt."""

    text: str
    is_mark: bool  # the template's, not the answer's
    key: str = ""  # of the message that holds the text


class Frame(NamedTuple):
    """What a template writes around the texts of an answer."""

    prompt: str
    keys: tuple[str, ...]  # of the answer's texts, in the order in which they are written
    marks: tuple[str, ...]  # before, between and after them: one more than keys

    def pieces(self, texts: Mapping[str, str]) -> list[Piece]:
        """The marks with these texts between them."""
        pieces = [Piece(self.marks[0], True)]
        for key, mark in zip(self.keys, self.marks[1:], strict=True):
            pieces += [Piece(texts[key], False, key), Piece(mark, True)]
        return pieces

    def visible(self, special: Collection[str]) -> "Frame":
        """Without white space before the texts and behind them: a completion brings its own."""
        if not self.keys:  # calls of tools alone
            return self
        first, *between, last = self.marks
        first = first if visible_text(first, special).strip() else ""
        if last and not visible_text(last, special).strip():
            last = "".join(last.split())
        return self._replace(marks=(first, *between, last))

    def cut(self, completion: str, texts: Mapping[str, str]) -> list[Piece] | None:
        """The pieces of a rendered completion; None where other marks are around its texts."""
        first, last = self.marks[0], self.marks[-1]
        if not (completion.startswith(first) and completion.endswith(last)):
            return None
        rest = completion[len(first) : len(completion) - len(last)]
        if len(completion) < len(first) + len(last):
            return None
        found: dict[str, str] = {}
        for key, mark in zip(self.keys[:-1], self.marks[1:-1], strict=True):
            forms = (texts[key], texts[key].strip(), texts[key].strip("\n"), texts[key].rstrip())
            form = next((form for form in forms if rest.startswith(form + mark)), None)
            if form is None:
                return None
            found[key], rest = form, rest[len(form) + len(mark) :]
        if not self.keys:
            return None if rest else [Piece(completion, True)]
        if rest.strip() != texts[self.keys[-1]].strip():  # the template did more than trim it
            return None
        return self.pieces({**found, self.keys[-1]: rest})


class Frames(NamedTuple):
    """What a template writes around answers of a row; None where it cannot be told."""

    plain: Frame | None = None  # of content alone
    thinking: Frame | None = None  # of thoughts and content, if the template writes thoughts


class Renderer:
    """Renders conversations with the chat template of a processor or a tokenizer."""

    def __init__(
        self,
        processor: Processor,
        template_kwargs: Mapping[str, Any],  # of all rows; a row's own win
    ):
        self.processor, self.template_kwargs = processor, template_kwargs
        self.is_vlm = isinstance(processor, ProcessorMixin)

    def prompt(self, row: Row) -> str:
        """As the model is prompted."""
        if row.is_prefill:
            return self._template(row, _turns(row), continue_final_message=True)
        return self._template(row, _turns(row), add_generation_prompt=True)

    def frame(self, row: Row, answer: Mapping[str, Any], prompt: str) -> Frame | None:
        """What is written around an answer with these texts; None where the template writes one of
        them twice.

        The prompt of a frame is the generation prompt, unless the template opens there what it does
        not write around such an answer (thoughts, of which it has none): then it is what the
        template writes before the answer.
        """
        texts = texts_of(answer)
        probes = {chr(FIRST_PROBE + i): key for i, key in enumerate(texts)}
        probed = {**answer, **{key: probe for probe, key in probes.items()}}
        rendered = self._answered(row, probed)
        places = sorted((rendered.find(probe), probe) for probe in probes if probe in rendered)
        if any(rendered.count(probe) != 1 for _, probe in places):
            return None
        start = len(prompt)
        if not rendered.startswith(prompt):
            common = _common_length(prompt, rendered)
            if not places or common < self._length_before_answer(row, prompt):
                raise _rewritten(row, prompt, rendered)
            start = places[0][0]
        ends = [start, *(place + 1 for place, _ in places)]
        marks = [
            rendered[begin:end]
            for begin, end in zip(ends, [*(place for place, _ in places), None], strict=True)
        ]
        return Frame(rendered[:start], tuple(probes[probe] for _, probe in places), tuple(marks))

    def frames(self, row: Row, prompt: str, others: Mapping[str, Any]) -> Frames:
        """Around an answer whose texts are not known yet; others are its calls of tools."""
        answer = {"content": "answer", **others, "role": "assistant"}
        if isinstance(answer["content"], list):
            answer["content"] = "answer"
        plain = self.frame(row, answer, prompt)
        try:
            thinking = self.frame(row, {**answer, "reasoning_content": "thoughts"}, prompt)
        except ValueError:  # a template may refuse thoughts beside content and calls
            thinking = None
        if thinking is not None and thinking.keys != ("reasoning_content", "content"):
            thinking = None
        return Frames(plain, thinking)

    def answered(self, row: Row, answer: Mapping[str, Any]) -> tuple[str, list[Piece]]:
        """The prompt and what follows it in the answered conversation."""
        prompt, rendered = self.prompt(row), self._answered(row, answer)
        if answer.get("content") is None and self._says_nothing(row, rendered):
            raise ValueError(
                f"{row.where}: an answer must have a content, or what the chat template writes, "
                f"got None and {sorted(answer.keys() - {'role', 'content'})}, of which it writes "
                "nothing; write the answer as its content, or drop the row."
            )
        frame = self.frame(row, answer, prompt)
        if frame is not None and rendered.startswith(frame.prompt):
            pieces = frame.cut(rendered[len(frame.prompt) :], texts_of(answer))
            if pieces is not None:
                return frame.prompt, pieces
        if not rendered.startswith(prompt):
            raise _rewritten(row, prompt, rendered)
        completion = rendered[len(prompt) :]
        end = frame.marks[-1] if frame is not None else ""
        if end and completion.endswith(end):
            return prompt, [Piece(completion[: -len(end)], True), Piece(end, True)]
        return prompt, [Piece(completion, True)]

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
        return _common_length(prompt, self._template(row, _turns(row)))

    def _template(self, row: Row, messages: Messages, **options: Any) -> str:
        if self.processor.chat_template is None:
            raise TemplateError(
                f"{row.where}: a conversation needs a chat template, "
                f"{type(self.processor).__name__} has none; set its chat_template, or pass prompt "
                "and completion as plain text."
            )
        try:
            text = self.processor.apply_chat_template(
                [self._message(message) for message in messages],
                tools=row.tools,
                tokenize=False,
                **{**self.template_kwargs, **row.chat_template_kwargs, **options},
            )
        except Exception as error:  # templates raise errors of jinja2, which is not a dependency
            raise TemplateError(
                f"{row.where}: the chat template must take the conversation, got an error for "
                f"the turns {[message['role'] for message in messages]} ({error}); change the row, "
                "or pass a processor with another template."
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
        return {**message, "content": _text(content)}


def visible_text(mark: str, special: Collection[str]) -> str:
    """A mark without special tokens, which spell nothing."""
    for token in special:
        mark = mark.replace(token, "")
    return mark


def _turns(row: Row) -> Messages:
    assert not isinstance(row.prompt, str), "plain text meets no template"
    return row.prompt


def texts_of(answer: Mapping[str, Any]) -> dict[str, str]:
    """The texts of an answer by key: its content, thoughts, whatever a template may write."""
    texts = {key: _text(value) if key == "content" else value for key, value in answer.items()}
    return {
        key: text
        for key, text in texts.items()
        if key != "role" and isinstance(text, str) and (text or key == "content")
    }


def _text(content: Any) -> Any:
    if content is None or isinstance(content, str):
        return content
    return "".join(part["text"] for part in content)


def _common_length(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _rewritten(row: Row, prompt: str, rendered: str) -> TemplateError:
    return TemplateError(
        f"{row.where}: the chat template must render an answered conversation as the prompt "
        f"plus the answer, got {rendered[-80:]!r} after {prompt[-40:]!r}; pass prompt and "
        "completion as plain text, or a processor with another template."
    )

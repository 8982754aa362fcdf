"""Token ids of what follows a prompt: those that it has there, not those that it has alone."""

from collections.abc import Collection, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from gold_trainer.rendering.frames import Piece

CALL: dict[str, Any] = {"id": "callcall1", "type": "function"}

# What a text is put behind where its own beginning matters: a tokenizer that marks the beginning of
# every text with a space marks the anchor's. One of them does not grow together with the text.
ANCHORS = ("\n", "a", ":", " ", "0")


def special_tokens_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that are found in a text by their name, unless special parsing is off."""
    added = tokenizer.added_tokens_decoder
    special = {token.content: token_id for token_id, token in added.items() if token.special}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**special, **dict(named)}


def end_ids_of_calls(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Special tokens with which the template ends a turn that calls a tool; some have one of their
    own there (<|call|>, <|tool_response>).
    """
    special, found = special_tokens_of(tokenizer), set()
    for arguments in ({"name": "value"}, "{}"):  # a few templates take them as text
        call = {**CALL, "function": {"name": "tool", "arguments": arguments}}
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False)).rstrip()
        except Exception:  # errors of jinja2: the template takes no calls, or other ones
            continue
        ends = [name for name in special if name and text.endswith(name)]
        found |= {special[max(ends, key=len)]} if ends else set()
    return found


class InContext:
    """Tokenises what follows a prompt, up to and with the token that ends the turn."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        end_of_turn_id: int,
        *,
        writes_end: bool = True,  # the template itself ends a turn
    ):
        self.tokenizer, self.writes_end = tokenizer, writes_end
        self.end_ids, self.end_of_turn_id = frozenset(end_ids), end_of_turn_id
        self.special = special_tokens_of(tokenizer)
        self.first_characters = {token[0] for token in self.special if token}
        ends = tokenizer.convert_ids_to_tokens(sorted(self.end_ids))
        self.ends = {str(token): i for token, i in zip(ends, sorted(self.end_ids), strict=True)}

    def ids(self, prompt: str, pieces: Sequence[Piece], *, is_ended: bool = True) -> list[int]:
        """Ids of the pieces behind the prompt. The turn ends with the first end token in the last
        mark; where a template writes none, with the one that is added. A turn that is not ended is
        without its last mark.
        """
        *pieces, last = pieces
        mark, has_end = self._up_to_end(last.text) if is_ended else ("", True)
        pieces = [*pieces, Piece(mark, True)]
        if any(self._has_special(piece.text) for piece in pieces if not piece.is_mark):
            ids = [i for piece in pieces for i in self._behind_any(piece.text, piece.is_mark)]
        else:
            ids = self._behind(prompt, "".join(piece.text for piece in pieces))
        return ids if has_end else [*ids, self.end_of_turn_id]

    def behind_end(self, text: str) -> str:
        """Text behind the first end token of a text, without special tokens and white space."""
        end = self._up_to_end(text)[0]
        rest = text[len(end) :]
        for name in filter(None, self.special):
            rest = rest.replace(name, "")
        return rest.strip()

    def length(self, text: str) -> int:
        """Tokens of a template's text, each picture counted as it is written."""
        return len(self._encode(text))

    def _up_to_end(self, mark: str) -> tuple[str, bool]:
        places = [(mark.find(end), end) for end in self.ends if end in mark]
        if not places:
            # Some turns end with a token of their own: <|eom_id|> in the place of <|eot_id|>.
            whole = mark.rstrip()
            has_own = self.writes_end and any(whole.endswith(name) for name in self.special if name)
            return (whole, True) if has_own else (mark, False)
        place, end = min(places, key=lambda found: (found[0], -len(found[1])))
        return mark[: place + len(end)], True

    def _has_special(self, text: str) -> bool:
        if self.first_characters.isdisjoint(text):
            return False
        return any(token in text for token in self.special)

    def _behind(self, prompt: str, text: str) -> list[int]:
        """Cut at the prompt's length. Where a token would hold text of both, the prompt keeps its
        own.
        """
        before, both = self._encode(prompt), self._encode(prompt + text)
        if both[: len(before)] == before:
            return both[len(before) :]
        return self._behind_any(text, True)

    def _behind_any(self, text: str, has_special: bool) -> list[int]:
        """Behind a text that does not grow together with this one."""
        if not text:
            return []
        for anchor in ANCHORS:
            before = self._encode(anchor, has_special)
            both = self._encode(anchor + text, has_special)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._encode(text, has_special)

    def _encode(self, text: str, has_special: bool = True) -> list[int]:
        """has_special: special tokens are found by their name in the text."""
        options = {} if has_special else {"split_special_tokens": True}
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"]

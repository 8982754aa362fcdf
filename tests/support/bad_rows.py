"""Rows that cannot be used, one of each kind, among good ones."""

from typing import Any

from support.tiny_models import tiny_rows

LONG = {"role": "user", "content": "What is this? " * 200}
ANSWER = {"role": "assistant", "content": "A bar."}
QUESTION = {"role": "user", "content": "What is this?"}
# Reason in the log -> such a row.
BAD: dict[str, dict[str, Any]] = {
    "long_prompt": {"messages": [LONG, ANSWER]},
    "picture": {"messages": [QUESTION, ANSWER], "images": [b"no picture"]},
    "template": {"messages": [QUESTION, QUESTION, ANSWER], "chat_template_kwargs": {"refuse": 1}},
    "no_answer": {"messages": [QUESTION]},
    "other": {"messages": [QUESTION, {**ANSWER, "content": "lone \ud83d"}]},
}
BAD_TEXT = {reason: row for reason, row in BAD.items() if reason not in ("picture", "template")}
REFUSING = "{% if refuse %}{{ raise_exception('no such turns') }}{% endif %}"


def with_bad(rows: list[dict[str, Any]], places: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with others put in front of those at these places, counted in what comes of it."""
    rows = list(rows)
    for place, row in sorted(places.items()):
        rows.insert(place, row)
    return rows


def text_rows(count: int) -> list[dict[str, Any]]:
    return tiny_rows(count, images=0)


def skips_of(trainer: Any) -> list[dict[str, float]]:
    """What each log says of rows that were left out."""
    names = "skipped_rows"
    logs = [
        {name.removeprefix(names): n for name, n in entry.items() if name.startswith(names)}
        for entry in trainer.state.log_history
    ]
    return [log for log in logs if log]

"""Rows of a student, and the same rows as a teacher sees them that sees more."""

from typing import Any

from support.tiny_models import tiny_picture, tiny_rows


def hinted(row: dict[str, Any], hint: str = "It is red. ") -> list[dict[str, str]]:
    question, answer = row["messages"]
    return [{"role": "user", "content": hint + question["content"]}, answer]


def views(family: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of a student, and the same as the teacher sees them: with a hint, with the answer behind
    it too, with other pictures and more of them, with both, and as they are.
    """
    has_pictures = family != "qwen3"
    rows = tiny_rows(5, images="mixed" if has_pictures else 0)
    seen = [dict(row) for row in rows]
    rows[0]["teacher_messages"] = hinted(rows[0])[:1]
    rows[1]["teacher_messages"] = hinted(rows[1])
    seen[0]["messages"], seen[1]["messages"] = hinted(rows[0]), hinted(rows[1])
    if has_pictures:
        rows[2]["teacher_images"] = seen[2]["images"] = [tiny_picture(7)]
        rows[3]["teacher_images"] = seen[3]["images"] = [tiny_picture(5), tiny_picture(6)]
        rows[1]["teacher_images"] = seen[1]["images"] = [tiny_picture(8)]
        rows[4]["teacher_images"] = []  # which does not count
    return rows, seen

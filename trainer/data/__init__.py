"""Rows, as their author wrote them: from files and datasets to prompts, answers and pictures."""

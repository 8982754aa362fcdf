"""Values that may come as JSON text."""

import json
from typing import Any


def parsed_json(value: Any) -> Any:
    """Columns of mixed shape are often kept as JSON, since Arrow has one shape for all rows."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # of a number of 5000 digits; of brackets without end
        return value  # refused by the caller

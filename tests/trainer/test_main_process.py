"""What the main process alone does, and how others hear of it."""

from types import SimpleNamespace

import pytest

from gold_trainer import ranks


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("a value"), ValueError, "^a value$"),
        (OSError("a disk"), ValueError, "^a disk$"),
        (KeyError("a key"), RuntimeError, "^KeyError: 'a key'$"),
    ],
)
def test_an_error_of_the_main_process_is_raised_on_all(error, kind, message, monkeypatch):
    """Whatever it is: the others would wait for the answer."""

    def fail():
        raise error

    sent = []
    monkeypatch.setattr(ranks, "broadcast_object_list", lambda answer: sent.append(answer))
    with pytest.raises(kind, match=message):
        ranks.on_main_process(SimpleNamespace(is_main_process=True, num_processes=2), fail)

    def receive(answer):
        answer[:] = sent[0]

    monkeypatch.setattr(ranks, "broadcast_object_list", receive)
    with pytest.raises(kind, match=message):
        ranks.on_main_process(SimpleNamespace(is_main_process=False, num_processes=2), fail)

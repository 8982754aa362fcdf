"""The end of a run whose rollouts a server writes: nothing waits for what nobody reads."""

import time
from threading import Event

import pytest

from gold_trainer.writers.background import Background
from support.forks import Forked


@pytest.mark.parametrize("name", ["RuntimeError", "KeyboardInterrupt"])
def test_a_process_with_an_error_ends_while_a_server_is_answering(name, tmp_path):
    run = Forked(tmp_path / "output", "support.vllm_leaving_step", str(tmp_path), name)
    run.wait_until(lambda: "LEAVING\n" in run.stdout)
    assert run.wait(40) != 0 and name in run.stderr


def test_what_has_not_begun_when_a_run_ends_is_not_asked_for():
    begun, may_end = [], Event()

    def ask(number):
        begun.append(number)
        assert may_end.wait(10)
        return number

    background = Background(ask, range(5), 2)
    while len(begun) < 2:
        time.sleep(0.01)
    background.cancel()
    may_end.set()
    assert [future.result() for future in background.futures[:2]] == [0, 1]
    assert all(future.cancelled() for future in background.futures[2:])
    assert sorted(begun) == [0, 1]


def test_the_first_error_ends_the_rest():
    def ask(number):
        if number == 0:
            raise OSError("gone")
        return number

    with pytest.raises(OSError, match="gone"):
        Background(ask, range(3), 1).results()
    assert Background(ask, [3, 1, 2], 2).results() == [3, 1, 2]

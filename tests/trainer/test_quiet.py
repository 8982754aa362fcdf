"""What one thread does not want to hear, another one does."""

import threading

from transformers.utils import logging

from gold_trainer.quiet import quiet
from gold_trainer.rendering.prompts import WARN_OF_SHAPES, process_prompts, prompt_ids
from support.tiny_models import tiny

NAME = WARN_OF_SHAPES[0]


def test_a_logger_is_quiet_in_one_thread_alone(caplog):
    logger = logging.get_logger(NAME)

    def other():
        with quiet(NAME):
            logger.warning("dropped")
            inside.set()
            leave.wait()
            logger.warning("dropped too")
            logger.error("an error")
        logger.warning("behind it")

    inside, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    logger.warning("of this thread")
    logging.get_logger("transformers.trainer").warning("of another logger")
    leave.set()
    thread.join()
    heard = [record.getMessage() for record in caplog.records]
    assert heard == ["of this thread", "of another logger", "an error", "behind it"]


def test_tokens_that_threads_count_at_a_time_leave_the_verbosity_as_it_was(monkeypatch):
    processor = tiny("qwen3_vl")[1]
    verbosity, seen, both = logging.get_verbosity(), [], threading.Barrier(2)

    def watched(*args, **kwargs):
        both.wait(timeout=60)
        seen.append(logging.get_verbosity())
        return process_prompts(*args, **kwargs)

    monkeypatch.setattr("gold_trainer.rendering.prompts.process_prompts", watched)
    threads = [threading.Thread(target=prompt_ids, args=(processor, "a", [])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [verbosity] * 2 and logging.get_verbosity() == verbosity

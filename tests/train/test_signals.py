import os
import signal
import threading

import pytest

from tilewright.train.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_is_recorded(number):
    with StopRequest() as stop:
        assert not stop
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop
        assert stop.signal == number


def test_second_interrupt_raises_immediately():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop


def test_first_interrupt_after_another_signal_does_not_raise():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)
        assert stop


def test_handlers_are_restored():
    def mine(*_):
        pass

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        with StopRequest():
            assert signal.getsignal(signal.SIGUSR1) is not mine
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_handler_set_inside_the_context_is_kept():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with StopRequest():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_set_no_handlers():
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    seen = []

    def work():
        with StopRequest() as stop:
            seen.extend(signal.getsignal(number) for number in STOP_SIGNALS)
            assert not stop

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == handlers


def test_forked_child_has_the_default_action():
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not stop

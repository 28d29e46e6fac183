"""Ending a run on request, at the next place from which it can go on."""

from __future__ import annotations

import contextlib
import signal
import threading

stopping = threading.Event()  # asked to


def request_stop() -> None:
    """Asks the run in this process to finish its step and write a checkpoint, or its batch of answers, and end."""
    stopping.set()


@contextlib.contextmanager
def stop_on_interrupt():
    """The first Ctrl-C asks for a stop; the second one is Python's own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number, frame):
        request_stop()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

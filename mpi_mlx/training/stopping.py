"""Ending a run on request, at the next place from which it can go on, and a stage that gets no better."""

from __future__ import annotations

import contextlib
import signal
import threading
from dataclasses import dataclass

stopping = threading.Event()  # asked to


def request_stop() -> None:
    """Asks the run in this process to finish its step and write a checkpoint, or its batch of answers, and end."""
    stopping.set()


@dataclass(frozen=True)
class Best:
    """Where a stage with ``patience`` stands: its lowest validation loss, the last step that had it, the first.

    Of steps alike the last has learned the most; but only a lower loss is progress. Without patience the
    validations are looked at, no more, and the stage's result is its last step's (as in TRL, where keeping the
    best has to be asked for).
    """

    step: int
    loss: float
    since: int

    @classmethod
    def read(cls, state: dict | None, spec) -> Best | None:
        """From a checkpoint's state."""
        if state is None or not spec.patience:
            return None
        return cls(state["step"], state["loss"], state.get("since", state["step"]))

    @staticmethod
    def after(best: Best | None, step: int, loss: float, spec) -> Best | None:
        """The best once ``step`` has been validated."""
        if not spec.patience:
            return None
        if best is None or loss < best.loss:
            return Best(step, loss, step)
        return Best(step, loss, best.since) if loss == best.loss else best

    def waited(self, step: int, spec) -> bool:
        """Whether the patience has run out."""
        return (step - self.since) // spec.validate_every >= spec.patience

    def told(self, stage: str, last: int) -> str:
        why = f"whose validation loss {self.loss:.4g} is lowest"
        return f"{stage}: kept the weights of step {self.step} of {last}, {why}"


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

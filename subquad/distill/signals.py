"""SIGTERM and Ctrl-C as a flag that the training loop looks at between two steps."""

import signal
import threading
from pathlib import Path

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and has saved. Not an Exception: nothing should swallow it by accident."""

    def __init__(self, stage: str, step: int, steps: int, folder: Path):
        self.stage, self.step, self.steps, self.folder = stage, step, steps, folder
        super().__init__(
            f"Stopped in stage {stage} after step {step} of {steps}. All is saved in {folder}: run the same command again to continue."
        )


class StopSignals:
    """`with StopSignals() as stop:` ... `if stop.requested:`. A second signal does not wait: it raises KeyboardInterrupt where it arrives.

    Outside the main thread Python allows no handlers; signals then act as they did before.
    """

    requested = False

    def __enter__(self) -> "StopSignals":
        main = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS} if main else {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

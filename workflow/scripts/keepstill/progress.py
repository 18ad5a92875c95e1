"""How far a call is: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import threading
from types import TracebackType
from typing import Any

# Where there is no terminal, a line after each fifth of the volumes.
_LINES = 5

_log = logging.getLogger(__name__)


class VolumeProgress:
    """Counts finished volumes and shows them; told from any thread.

    Parameters
    ----------
    label : str
        What is counted, for people.
    total : int
        Volumes to come.
    is_shown : bool
        False counts in silence: on all ranks but one.
    """

    def __init__(self, label: str, total: int, is_shown: bool) -> None:
        self._label, self._total, self._is_shown = label, total, is_shown
        self._done = 0
        self._lock = threading.Lock()
        self._bar: Any = None

    def __enter__(self) -> "VolumeProgress":
        if self._is_shown and sys.stderr.isatty():
            self._start_bar()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def count(self, *volume: int) -> None:
        """Take note of one more finished volume; which one does not matter."""
        del volume
        with self._lock:
            self._done += 1
            if self._bar is not None:
                self._bar.advance(self._task)
            elif self._is_shown and self._is_a_fifth():
                _log.info("%s: %d of %d volumes", self._label, self._done, self._total)

    def _is_a_fifth(self) -> bool:
        before = (self._done - 1) * _LINES // self._total
        return self._done * _LINES // self._total > before and self._total >= 10 * _LINES

    def _start_bar(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        text = (TextColumn(self._label), BarColumn(), MofNCompleteColumn(), TextColumn("volumes"))
        self._bar = Progress(*text, TimeRemainingColumn(), console=Console(stderr=True))
        self._task = self._bar.add_task(self._label, total=self._total)
        self._bar.start()

"""A progress bar for the terminal: tqdm where it is installed, plain text otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Progress:
    """Counts steps on stderr and prints whole lines on stdout above the bar.

    Without a terminal there is no bar, only the lines.
    """

    WIDTH = 30
    REFRESH = 0.1  # seconds

    def __init__(
        self, total: int, title: str, initial: int = 0, stream: TextIO | None = None
    ) -> None:
        self.stream = stream or sys.stderr
        self.total, self.title, self.count = total, title, initial
        self.terminal = self.stream.isatty()
        self.note = ""
        self.shown = 0.0
        self.bar = None
        if self.terminal and tqdm is not None:
            self.bar = tqdm(
                total=total, initial=initial, desc=title, unit="step", file=self.stream, leave=False
            )

    def step(self) -> None:
        self.count += 1
        if self.bar is not None:
            self.bar.update()
        elif self.terminal and time.monotonic() - self.shown > self.REFRESH:
            self._draw()

    def _draw(self) -> None:
        self.shown = time.monotonic()
        full = self.WIDTH * self.count // max(1, self.total)
        bar = "#" * full + "." * (self.WIDTH - full)
        self.stream.write(f"\r{self.title} [{bar}] {self.count}/{self.total} {self.note}")
        self.stream.flush()

    def line(self, text: str, note: str = "") -> None:
        """Print ``text``; keep ``note`` beside the bar."""
        self.note = note
        if self.bar is not None:
            self.bar.clear()
            self.bar.set_postfix_str(note, refresh=False)
        elif self.terminal:
            self._erase()
        print(text, flush=True)

    def _erase(self) -> None:
        self.stream.write("\r\033[K")
        self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.terminal:
            self._erase()

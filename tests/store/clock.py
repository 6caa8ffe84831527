"""A clock that moves when a test says so."""

from __future__ import annotations

START = 1_790_000_000


class Clock:
    def __init__(self) -> None:
        self.seconds = float(START)

    def __call__(self) -> float:
        return self.seconds

    def forward(self, seconds: float) -> None:
        self.seconds += seconds

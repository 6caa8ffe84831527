"""A command called as a person would, in this process. Does not know: which command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.cli import main

Said = tuple[int, str, str]  # exit code, stdout, stderr
Run = Callable[..., Said]


def caller(command: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """What runs `luthier COMMAND` with the arguments that it is given."""

    def invoke(*arguments: str | Path) -> Said:
        with pytest.raises(SystemExit) as left:
            main([command, *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return invoke

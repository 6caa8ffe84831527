"""Base names to folders for the server, in a process of its own: converting weights loads torch, the server never does.

`python -m luthier.cli.bases NAME=MODEL ...` prints {"folders": {NAME: folder}} or an error object as its last line.
Does not know: where models come from (engine/catalogue.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli.output import error_object, print_json, resolve_model
from luthier.settings import child_environment
from luthier.spec.errors import BadSetting, Broken, LuthierError, NotFound, NotNow, UserError

if TYPE_CHECKING:
    from luthier.settings import Settings

KINDS: dict[str, type[LuthierError]] = {
    kind.code: kind for kind in (UserError, BadSetting, NotFound, NotNow, Broken, LuthierError)
}


def base_folders(settings: Settings) -> dict[str, Path]:
    """Public name of each base on offer -> its folder; downloads and converts what is not here yet.

    Raises what catalogue.resolve raises.
    """
    pairs = [f"{name}={source}" for name, source in settings.offered.sources.items()]
    done = subprocess.run(
        [sys.executable, "-m", "luthier.cli.bases", *pairs],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        env=child_environment(LUTHIER_HOME=str(settings.home), LUTHIER_HUB=settings.hub),
    )
    lines = done.stdout.splitlines()
    if not lines:
        raise Broken(f"The process that prepares base models ended with exit code {done.returncode}.")
    told = json.loads(lines[-1])
    if "folders" not in told:
        raise KINDS.get(told["code"], Broken)(told["message"], hint=told["hint"], param=told["param"])
    return {name: Path(folder) for name, folder in told["folders"].items()}


def _prepare(pairs: list[str]) -> int:
    try:
        named = [pair.partition("=") for pair in pairs]
        print_json({"folders": {name: str(resolve_model(source)) for name, _, source in named}})
    except LuthierError as error:
        print_json(error_object(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_prepare(sys.argv[1:]))

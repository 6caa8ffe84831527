"""An environment of its own for each group of peers, from a file of exact versions; made anew when that changes.

Does not know: what runs in it.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path


def python_of(requirements: Path, under: Path) -> Path:
    """The interpreter of the environment for `requirements`, made first when it is not there.

    Raises SystemExit with pip's last lines when it cannot be made.
    """
    folder = under / requirements.stem
    python, note = folder / "bin" / "python", folder / ".made-from"
    wanted = digest(requirements)
    if note.is_file() and note.read_text() == wanted:
        return python
    print(f"Making the environment {folder} (torch is large: minutes on a slow line)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    # Each file lists all that is needed, so pip resolves nothing; some of it asks for what training text never loads.
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "-r", requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.splitlines()[-5:])
        raise SystemExit(f"{requirements.name} could not be installed with {sys.version.split()[0]}:\n{last}")
    note.write_text(wanted)
    return python


def digest(requirements: Path) -> str:
    return hashlib.sha256(requirements.read_bytes()).hexdigest()[:10]

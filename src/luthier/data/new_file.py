"""Files that appear whole: written beside their place, synced, renamed; what is there already stays.

Does not know: what is in them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from luthier.spec.errors import BadSetting, NotFound, NotNow
from luthier.spec.run import fsync_directory

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def check_free(path: Path, force: bool, param: str = "out") -> None:
    """Refuse a place that cannot be written before any work is done. Raises BadSetting, NotFound."""
    if path.is_dir():
        raise BadSetting(f"{path} is a folder, wanted the name of a new file.", param=param)
    if path.exists() and not force:
        raise BadSetting(f"{path} is there already.", hint="Choose another name, or give --force.", param=param)
    if not path.parent.is_dir():
        raise NotFound(f"There is no folder {path.parent} to write {path.name} into.", hint="Make it.", param=param)


@contextlib.contextmanager
def new_file(path: Path, *, force: bool = False, param: str = "out") -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` when the block ends well, and not at all when it raises.

    With `force` it replaces what is there. Raises BadSetting, NotFound as check_free does, also when another file took
    the name meanwhile, and NotNow for a full disk.
    """
    with beside(path, force=force, param=param) as place, open(place, "xb") as handle:
        yield handle
        handle.flush()
        os.fsync(handle.fileno())


@contextlib.contextmanager
def beside(path: Path, *, force: bool = False, param: str = "out") -> Iterator[Path]:
    """The name of a temporary file in the folder of `path`, for writers that open files themselves.

    What the block leaves there gets the name `path` when the block ends well. Raises as new_file does.
    """
    check_free(path, force, param)
    place = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield place
        if force:
            os.replace(place, path)
        else:
            os.link(place, path)  # unlike a rename, this fails when the name is taken
    except FileExistsError as error:
        raise BadSetting(f"{path} is there already.", hint="Choose another name.", param=param) from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NotNow(f"{path} could not be written: {error.strerror}.", hint="Make room and try again.") from error
    finally:
        place.unlink(missing_ok=True)
    fsync_directory(path.parent)

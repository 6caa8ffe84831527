"""What the data doctor says of an uploaded training file: GET /luthier/files/{file_id}/check, an extension.

A file may take minutes, and no client waits for them: a process of its own looks, one at a time, and the answer is 200
with the report when that is there within two seconds (most files), else 202, to be asked again. Reports are kept by
content, so a file is looked at once.
Does not know: what is looked for (the data room), how reports are kept (store/checks.py).
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import TaskGroup
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from luthier.api.asking import At
from luthier.api.errors import ApiError
from luthier.api.files import no_such_file
from luthier.api.services import Services
from luthier.data import checkup
from luthier.settings import child_environment
from luthier.spec.errors import NotFound
from luthier.store.files import File

router = APIRouter(tags=["files"])

PATIENCE = 2.0  # seconds that a request waits for the report
MOST_WAITING = 32  # files
MOST_FAILED = 1000  # remembered


class Checkups:
    """The files that are being looked at, for one server."""

    def __init__(self, services: Services) -> None:
        self.files, self.checks = services.files, services.files.checks
        self.turn = anyio.Semaphore(1)
        self.asked: dict[Path, anyio.Event] = {}
        self.failed: dict[Path, str] = {}
        self.tasks: TaskGroup | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look at files for as long as the block runs."""
        async with anyio.create_task_group() as self.tasks:
            try:
                yield
            finally:
                self.tasks.cancel_scope.cancel()

    async def report(self, file: File) -> bytes | None:
        """The report as JSON; None while it is being made. Raises ApiError 400 for a file that cannot be looked at
        within bounds, 503 when too many wait."""
        name = checkup.checked_name(file.filename)
        place = await anyio.to_thread.run_sync(self.checks.path, file.sha256, name)
        report = await anyio.to_thread.run_sync(self.checks.read, file.sha256, name)
        if report is not None:
            return report
        done = self.asked.get(place) or self._begin(file, name, place)
        with anyio.move_on_after(PATIENCE):
            await done.wait()
        if place in self.failed:
            raise ApiError(400, self.failed[place], param="file_id", code="check_failed")
        return await anyio.to_thread.run_sync(self.checks.read, file.sha256, name)

    def _begin(self, file: File, name: str, place: Path) -> anyio.Event:
        if place in self.failed:
            raise ApiError(400, self.failed[place], param="file_id", code="check_failed")
        if len(self.asked) >= MOST_WAITING or self.tasks is None:
            message = f"{len(self.asked)} files wait to be checked: ask again in a minute."
            raise ApiError(503, message, type="server_error", headers={"retry-after": "60"})
        done = self.asked[place] = anyio.Event()
        self.tasks.start_soon(self._look, file, name, place, done)
        return done

    async def _look(self, file: File, name: str, place: Path, done: anyio.Event) -> None:
        try:
            async with self.turn:
                code = await self._carry_out(file, name, place)
            if code:
                took = f"it took more than {checkup.LIMITS}"
                reason = (
                    took if code < 0 else f"the process that looked ended with exit code {code}; most likely {took}"
                )
                while len(self.failed) >= MOST_FAILED:
                    self.failed.pop(next(iter(self.failed)))
                self.failed[place] = f"The file {file.id} cannot be checked: {reason}."
        finally:
            del self.asked[place]
            done.set()

    async def _carry_out(self, file: File, name: str, place: Path) -> int:
        """The exit code of the process that looks; it ends with this server, however that ends."""
        folder = Path(tempfile.mkdtemp(prefix="luthier-check-"))
        try:
            blob = self.files.blobs.path(file.sha256)
            process = await anyio.open_process(
                checkup.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=child_environment(),
            )
            try:
                assert process.stdin is not None
                with contextlib.suppress(anyio.BrokenResourceError):  # it died at once: its exit code tells
                    await process.stdin.send(checkup.asking([(blob, name)], place, folder, tied=True))
                return await process.wait()
            finally:
                if process.returncode is None:
                    process.kill()
                with anyio.CancelScope(shield=True):
                    await process.aclose()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@router.get(
    "/luthier/files/{file_id}/check",
    response_model=None,
    summary="What the data doctor says of a training file (an extension)",
)
async def check_file(file_id: str, request: Request, at: At) -> Response:
    """200 with what `luthier data check --json` prints; 202 while that is being made."""
    try:
        file = await anyio.to_thread.run_sync(at.files.get, file_id)
    except NotFound:
        raise no_such_file(file_id) from None
    if file.purpose != "fine-tune":
        message = f"{file.id} has the purpose {file.purpose}; training files are checked, whose purpose is fine-tune."
        raise ApiError(400, message, param="file_id")
    checkups: Checkups = request.app.state.checkups
    report = await checkups.report(file)
    if report is not None:
        return Response(report, media_type="application/json")
    waiting: dict[str, Any] = {"object": "luthier.file.check", "file_id": file.id, "status": "in_progress"}
    return JSONResponse(waiting, 202, {"retry-after": "2"})

"""Fifty concurrent clients: nothing breaks, no job is lost, memory stays flat.

Short by default; LUTHIER_LOAD_SECONDS=180 (or `python -m tests.clients.load`) is the whole of it, and only then the
answers' times count: on a machine that runs other tests beside, they say nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.clients.load import UNLIMITED, Load
from tests.clients.served import Server

SECONDS = float(os.environ.get("LUTHIER_LOAD_SECONDS") or 15)
LONG = 120
GROWTH = 32 * 2**20  # bytes


@pytest.mark.xdist_group("load")
@pytest.mark.timeout(SECONDS + 300)
def test_fifty_clients_at_once(tiny: Path, tmp_path: Path) -> None:
    with Server(tmp_path / "home", "--base", f"tiny={tiny}", env=UNLIMITED) as server:
        report = Load(server, SECONDS).run()
    print(report)
    assert report.server_errors == [], report
    assert report.faults == [], report
    assert set(report.jobs.values()) == {"succeeded"}, report
    assert len(report.jobs) >= 2
    for name, (before, after) in report.memory.items():
        assert after - before < GROWTH, f"{name} grew\n{report}"
    if SECONDS >= LONG:
        assert report.busy_p95 <= 3 * report.idle_p95, report

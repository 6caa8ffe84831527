"""The acceptance checks that official clients make of a running server, one test a check and client.

The numbers in the names are those of the reference's section 7. The checks themselves are in scripts/, which each
client's own interpreter runs; here is only what they reported. The command lines have files of their own beside this.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.clients.conftest import LANES, REAL_LANES, SCRIPTS, Reports

pytestmark = pytest.mark.timeout(900)


def checks(lanes: tuple[tuple[tuple[str, str], ...], ...]) -> list[object]:
    """(script, client, check) of every check that the scripts define."""
    found = []
    for script, client in (one for lane in lanes for one in lane):
        names = re.findall(r"^(?:async )?(?:def|function) (check_\w+)", (SCRIPTS / script).read_text(), re.MULTILINE)
        assert names, script
        found += [pytest.param(script, client, name, id=f"{client}-{name[6:]}") for name in names]
    return found


@pytest.mark.xdist_group("clients")
@pytest.mark.parametrize(("script", "client", "check"), checks(LANES))
def test_a_client(script: str, client: str, check: str, reports: Reports) -> None:
    told(reports, script, client, check)


@pytest.mark.xdist_group("clients-real")
@pytest.mark.parametrize(("script", "client", "check"), checks(REAL_LANES))
def test_a_client_of_the_real_model(script: str, client: str, check: str, real_reports: Reports) -> None:
    told(real_reports, script, client, check)


def told(reports: Reports, script: str, client: str, check: str) -> None:
    outcome = reports.of(script, client)[check]
    if "missing" in outcome:
        pytest.skip(f"{outcome['missing']} is not at hand")
    assert outcome["ok"], f"{Path(script).stem} with {client}:\n{outcome['error']}"

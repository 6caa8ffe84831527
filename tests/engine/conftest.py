"""Who computes: laws of the engine hold with our kernels and with torch's alike."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest


@pytest.fixture(scope="module", params=["own", "torch"])
def either_kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The whole file twice: `pytestmark = pytest.mark.usefixtures("either_kernels")`."""
    from luthier.engine import kernels

    if request.param == "torch":
        with mock.patch.object(kernels, "able", return_value=False):
            yield "torch"
        return
    if not kernels.able():
        pytest.skip(f"no kernels of our own: {kernels.absent()}")
    yield "own"

"""What every test shares: quiet threads, no waiting for a hub, and two models (a tiny random one, the real 135M)."""

from __future__ import annotations

import os

# Before torch or huggingface_hub are imported: small thread pools, and a hub that is not there fails at once.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_ETAG_TIMEOUT": "3",
    "HF_HUB_DOWNLOAD_TIMEOUT": "10",
}.items():
    os.environ.setdefault(_name, _value)

from pathlib import Path

import pytest

# Python processes that tests start import the package of this tree, installed or not.
_SOURCE = str(Path(__file__).parents[1] / "src")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_SOURCE, os.environ.get("PYTHONPATH"))))

from tests import tiny as tiny_models


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer random Llama with its tokenizer and ChatML template. Read only: copy it to change it."""
    import torch

    torch.set_num_threads(1)
    return tiny_models.make_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real smollm2-135m-instruct, pulled when absent. Skips only when no source answers."""
    from luthier.engine import catalogue
    from luthier.spec.errors import NotNow

    try:
        return catalogue.resolve("smollm2-135m-instruct")
    except NotNow as error:
        pytest.skip(f"no source of smollm2-135m-instruct answers: {error}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests wish to tell without asserting it: their property `told`."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "told":
                terminalreporter.write_line(str(value))

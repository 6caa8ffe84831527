"""An engine that trains nothing: it leaves a model and the last word at once. `python quick_engine.py RUN`."""

import sys

from luthier.spec.run import RunFolder

if __name__ == "__main__":
    run = RunFolder(sys.argv[1])
    run.emit("started", pid=0, run=str(run.path), version="0", resumed_from=None)
    run.model.mkdir()
    (run.model / "adapter_config.json").write_text("{}")
    run.emit("finished", status="succeeded", model=str(run.model), report={"trained_tokens": 5})

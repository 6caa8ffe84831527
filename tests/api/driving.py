"""Plays a worker by hand: brings the oldest waiting job on, through the store's leases."""

from __future__ import annotations

from typing import Any

from luthier.api.services import Services
from luthier.store.history import EventDraft
from luthier.store.leases import Lease

SECONDS = 600.0
RESOLVED = {"n_epochs": 3, "batch_size": 1, "learning_rate_multiplier": 1.0}
JSONL = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def training_file(services: Services, rows: int = 12, purpose: str = "fine-tune") -> str:
    return services.files.create([JSONL * rows], filename="train.jsonl", purpose=purpose).id


def body(services: Services, **changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "training_file": training_file(services), **changes}


def validate(services: Services) -> None:
    claimed = services.leases.claim("worker", SECONDS, "validate")
    assert claimed is not None
    services.leases.validated(claimed[1])


def start(services: Services) -> Lease:
    """Validates the oldest job and claims it; give it no rival."""
    validate(services)
    claimed = services.leases.claim("worker", SECONDS)
    assert claimed is not None
    services.leases.record(claimed[1], hyperparameters=RESOLVED)
    return claimed[1]


def steps(services: Services, lease: Lease, first: int, last: int, total: int) -> None:
    drafts = [
        EventDraft(
            f"Step {step}/{total}: training loss=0.50",
            offset=step * 100,
            type="metrics",
            data={"step": step, "train_loss": 0.5, "train_mean_token_accuracy": 0.75, "total_steps": total},
        )
        for step in range(first, last + 1)
    ]
    services.leases.append_events(lease, drafts)


def register(services: Services, name: str, **given: Any) -> None:
    folder = services.settings.home / "tuned"
    folder.mkdir(exist_ok=True)
    services.models.register(name, base="tiny", folder=folder, content_hash="0" * 64, **given)


def finish(services: Services, lease: Lease, name: str = "ft:tiny:luthier::12345678") -> str:
    """A result file and a registered model; gives the file's id."""
    result = services.files.create([b"step\n1\n"], filename="step_metrics.csv", purpose="fine-tune-results").id
    register(services, name, job_id=lease.job_id)
    services.leases.finish(lease, fine_tuned_model=name, result_files=[result], trained_tokens=99)
    return result

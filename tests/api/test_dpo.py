"""Method dpo at /fine_tuning/jobs: what may be asked with it, what is refused by which name, how such a job looks."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from luthier.api.services import Services
from tests.api import driving
from tests.api.conftest import Live
from tests.api.test_jobs import create, refused

AUTO = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto", "beta": "auto"}


def dpo(**numbers: Any) -> dict[str, Any]:
    return {"type": "dpo", "dpo": {"hyperparameters": numbers}}


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        ({"type": "dpo"}, {}),
        ({"type": "dpo", "dpo": {}}, {}),
        ({"type": "dpo", "dpo": {"hyperparameters": None}, "supervised": None, "reinforcement": None}, {}),
        (dpo(beta=None, n_epochs="auto"), {}),
        (dpo(n_epochs=2, beta=0.1, batch_size=8), {"n_epochs": 2, "beta": 0.1, "batch_size": 8}),
        (dpo(beta=2), {"beta": 2.0}),
        (dpo(beta="auto", learning_rate_multiplier=0.5), {"learning_rate_multiplier": 0.5}),
    ],
)
def test_what_is_asked_comes_back_and_reaches_the_worker(
    client: TestClient, services: Services, method: dict[str, Any], numbers: dict[str, Any]
) -> None:
    job = create(client, services, method=method)
    assert job["method"] == {"type": "dpo", "dpo": {"hyperparameters": AUTO | numbers}}
    assert job["hyperparameters"] is None
    known = services.jobs.get(job["id"])
    assert known.method == "dpo"
    assert (known.request["method"], known.request["hyperparameters"]) == ({"type": "dpo"}, AUTO | numbers)


def test_the_older_place_is_heard_too(client: TestClient, services: Services) -> None:
    job = create(client, services, method=dpo(beta=0.2, batch_size=2), hyperparameters={"n_epochs": 4, "batch_size": 2})
    numbers = {"n_epochs": 4, "batch_size": 2, "beta": 0.2}
    assert job["method"]["dpo"]["hyperparameters"] == AUTO | numbers


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"method": dpo(beta=0)}, "method.dpo.hyperparameters.beta"),
        ({"method": dpo(beta=-0.1)}, "method.dpo.hyperparameters.beta"),
        ({"method": dpo(beta=2.1)}, "method.dpo.hyperparameters.beta"),
        ({"method": dpo(beta=3)}, "method.dpo.hyperparameters.beta"),
        ({"method": dpo(beta="x")}, "method.dpo.hyperparameters.beta"),
        ({"method": dpo(beta="0.1")}, "method.dpo.hyperparameters.beta"),
        ({"method": dpo(beta=True)}, "method.dpo.hyperparameters.beta"),
        ({"method": dpo(n_epochs=51)}, "method.dpo.hyperparameters.n_epochs"),
        ({"method": dpo(batch_size=0)}, "method.dpo.hyperparameters.batch_size"),
        ({"method": dpo(learning_rate_multiplier=0)}, "method.dpo.hyperparameters.learning_rate_multiplier"),
        ({"method": dpo(replay=0.1)}, "method.dpo.hyperparameters.replay"),
        ({"method": dpo(gamma=1)}, "method.dpo.hyperparameters.gamma"),
        ({"method": {"type": "dpo", "dpo": {"beta": 0.1}}}, "method.dpo.beta"),
        ({"method": {"type": "dpo", "dpo": "auto"}}, "method.dpo"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"method": {"type": "dpo", "dpo": {}, "reinforcement": {"grader": {}}}}, "method.reinforcement"),
        ({"method": {"type": "supervised", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method.dpo"),
        ({"method": {"type": "reinforcement", "dpo": {}}}, "method"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.1}}}},
            "method.supervised.hyperparameters.beta",
        ),
        ({"method": dpo(), "hyperparameters": {"beta": 0.1}}, "hyperparameters.beta"),
        ({"method": dpo(), "hyperparameters": {"replay": 0.1}}, "hyperparameters.replay"),
        ({"method": dpo(), "metric": "json"}, "metric"),
        ({"method": dpo(), "keep_general": True, "validation_file": "file-" + "x" * 24}, "keep_general"),
        ({"method": dpo(n_epochs=1), "hyperparameters": {"n_epochs": 2}}, "hyperparameters.n_epochs"),
    ],
)
def test_what_is_refused_names_its_field(
    client: TestClient, services: Services, changes: dict[str, Any], param: str
) -> None:
    assert refused(client, driving.body(services, **changes))["param"] == param
    assert services.jobs.list().data == ()


def test_what_else_a_job_may_ask_for(client: TestClient, services: Services) -> None:
    asked = {"metric": "auto", "proof_rows": 5, "must_improve": 0.1, "max_forgetting": 0.05, "keep_general": False}
    held_out = driving.training_file(services)
    job = create(client, services, method=dpo(), validation_file=held_out, **asked)
    known = services.jobs.get(job["id"]).request
    assert {name: known[name] for name in asked} == asked


def test_the_range_of_beta_is_said(client: TestClient, services: Services) -> None:
    message = refused(client, driving.body(services, method=dpo(beta=3)))["message"]
    assert message.endswith('found 3, wanted a number above 0 and at most 2 or "auto".')


def test_a_job_on_its_way(live: Live, services: Services) -> None:
    """The official client reads what it came to, and what its checkpoints measured."""
    with openai.OpenAI(api_key=live.key, base_url=live.base_url) as sdk:
        made = sdk.fine_tuning.jobs.create(
            model="tiny",
            training_file=driving.training_file(services),
            method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "beta": 0.1, "batch_size": 8}}},
        )
        assert made.method is not None and made.method.dpo is not None and made.method.dpo.hyperparameters is not None
        assert made.method.dpo.hyperparameters.learning_rate_multiplier == "auto"
        lease = driving.start(services)
        services.leases.record(lease, hyperparameters={**driving.RESOLVED, "beta": 0.1})
        measured = {"step": 2, "train_loss": 0.5, "train_reward_accuracy": 0.75, "train_reward_margin": -0.25}
        services.leases.add_checkpoint(lease, step=2, model="ft:tiny:luthier::12345678:ckpt-step-2", metrics=measured)
        job = sdk.fine_tuning.jobs.retrieve(made.id)
        assert job.hyperparameters is None
        assert job.method is not None and job.method.to_dict() == {
            "type": "dpo",
            "dpo": {"hyperparameters": {**driving.RESOLVED, "beta": 0.1}},
        }
        [kept] = sdk.fine_tuning.jobs.checkpoints.list(made.id)
        assert kept.metrics.to_dict() == measured
        assert kept.metrics.train_mean_token_accuracy is None
        assert [one.id for one in sdk.fine_tuning.jobs.list()] == [made.id]

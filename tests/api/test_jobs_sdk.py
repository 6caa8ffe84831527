"""The official client (openai 3.57) against a running server: jobs, by the numbers of the acceptance list.

What a worker does is played through the store (driving.py), so that the states are those that each check needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from luthier.api.services import Services
from tests.api import driving
from tests.api.conftest import Live


@pytest.fixture
def sdk(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=live.key, base_url=live.base_url) as client:
        yield client


def create(sdk: openai.OpenAI, services: Services, **changes: object) -> str:
    made = sdk.fine_tuning.jobs.create(model="tiny", training_file=driving.training_file(services), **changes)  # type: ignore[arg-type]
    return made.id


def test_11_a_job_with_only_what_is_required(sdk: openai.OpenAI, services: Services) -> None:
    job = sdk.fine_tuning.jobs.create(model="tiny", training_file=driving.training_file(services))
    assert job.status == "validating_files"
    assert isinstance(job.seed, int)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == ("auto", "auto")
    driving.finish(services, driving.start(services))
    done = sdk.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", "ft:tiny:luthier::12345678", 99)
    assert (done.hyperparameters.n_epochs, done.hyperparameters.batch_size) == (3, 1)
    assert done.finished_at is not None


def test_12_24_26_what_is_asked_is_checked(sdk: openai.OpenAI, services: Services) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(sdk, services, suffix="s" * 65)
    assert refused.value.param == "suffix"
    for name, value in {"n_epochs": 51, "batch_size": 257, "learning_rate_multiplier": 0}.items():
        method = {"type": "supervised", "supervised": {"hyperparameters": {name: value}}}
        with pytest.raises(openai.BadRequestError) as refused:
            create(sdk, services, method=method)
        assert refused.value.param == f"method.supervised.hyperparameters.{name}"
        with pytest.raises(openai.BadRequestError) as refused:
            create(sdk, services, hyperparameters={name: value})
        assert refused.value.param == f"hyperparameters.{name}"
    wandb = {"type": "wandb", "wandb": {"project": "p", "entity": "e", "name": "n", "tags": ["t"]}}
    job = sdk.fine_tuning.jobs.retrieve(create(sdk, services, integrations=[wandb]))
    assert job.integrations is not None
    assert job.integrations[0].to_dict() == wandb
    with pytest.raises(openai.BadRequestError):
        create(sdk, services, integrations=[{"type": "other", "other": {}}])


def test_18_lists_page_by_themselves_and_filter(sdk: openai.OpenAI, services: Services) -> None:
    made = [create(sdk, services, metadata={"n": str(n), "a b": "c&d"}) for n in range(4)]
    assert [job.id for job in sdk.fine_tuning.jobs.list(limit=1)] == made[::-1]
    assert [job.id for job in sdk.fine_tuning.jobs.list(metadata={"n": "2", "a b": "c&d"})] == [made[2]]
    assert list(sdk.fine_tuning.jobs.list(metadata={"n": "5"})) == []
    bare = create(sdk, services)
    assert [job.id for job in sdk.fine_tuning.jobs.list(extra_query={"metadata": "null"})] == [bare]


def test_19_20_events_and_checkpoints_page_by_themselves(sdk: openai.OpenAI, services: Services) -> None:
    job_id = create(sdk, services)
    lease = driving.start(services)
    driving.steps(services, lease, 1, 5, 5)
    for step in (2, 4):
        name = f"ft:tiny:luthier::12345678:ckpt-step-{step}"
        services.leases.add_checkpoint(lease, step=step, model=name, metrics={"train_loss": 0.5})
    driving.finish(services, lease)
    events = list(sdk.fine_tuning.jobs.list_events(job_id, limit=3))
    assert len({event.id for event in events}) == len(events) == 11
    said = [event.message for event in reversed(events)]
    assert said[0] == f"Created fine-tuning job: {job_id}"
    assert said[4] == "Step 1/5: training loss=0.50"
    assert said[-2:] == [
        "New fine-tuned model created: ft:tiny:luthier::12345678",
        "The job has successfully completed",
    ]
    steps = [event.data["step"] for event in reversed(events) if event.type == "metrics"]  # type: ignore[index]
    assert steps == [1, 2, 3, 4, 5]
    kept = list(sdk.fine_tuning.jobs.checkpoints.list(job_id, limit=1))
    assert [one.step_number for one in kept] == [4, 2]
    assert kept[0].fine_tuned_model_checkpoint.endswith(":ckpt-step-4")
    assert kept[0].metrics.train_loss == 0.5


def test_21_cancel_and_cancel_again(sdk: openai.OpenAI, services: Services) -> None:
    job_id = create(sdk, services)
    lease = driving.start(services)
    job = sdk.fine_tuning.jobs.cancel(job_id)
    assert (job.status, job.fine_tuned_model) == ("cancelled", None)
    services.leases.release(lease)
    with pytest.raises(openai.BadRequestError):
        sdk.fine_tuning.jobs.cancel(job_id)


def test_22_pause_and_resume(sdk: openai.OpenAI, services: Services) -> None:
    job_id = create(sdk, services)
    lease = driving.start(services)
    sdk.fine_tuning.jobs.pause(job_id)
    services.leases.release(lease)
    assert sdk.fine_tuning.jobs.retrieve(job_id).status == "paused"  # type: ignore[comparison-overlap]
    assert sdk.fine_tuning.jobs.resume(job_id).status == "queued"


def test_25_what_does_not_exist(sdk: openai.OpenAI, services: Services) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.fine_tuning.jobs.create(model="tiny", training_file="file-" + "x" * 24)
    assert refused.value.param == "training_file"
    batch = driving.training_file(services, purpose="batch")
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.fine_tuning.jobs.create(model="tiny", training_file=batch)
    assert refused.value.param == "training_file"
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.fine_tuning.jobs.create(model="nothing", training_file=driving.training_file(services))
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.fine_tuning.jobs.retrieve("ftjob-" + "x" * 24)
    assert (missing.value.param, missing.value.code) == ("fine_tune_id", "fine_tune_not_found")


def test_30_permissions(sdk: openai.OpenAI, services: Services) -> None:
    name = "ft:tiny:luthier::12345678:ckpt-step-4"
    driving.register(services, name)
    permissions = sdk.fine_tuning.checkpoints.permissions
    made = list(permissions.create(name, project_ids=["proj_a", "proj_b", "proj_c"]))
    assert [one.project_id for one in made] == ["proj_a", "proj_b", "proj_c"]
    listed = list(permissions.list(name, limit=1))
    assert [one.project_id for one in listed] == ["proj_c", "proj_b", "proj_a"]
    gone = permissions.delete(listed[0].id, fine_tuned_model_checkpoint=name)
    assert gone.deleted is True
    assert len(list(permissions.list(name))) == 2

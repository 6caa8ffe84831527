"""Acceptance checks 21, 22, 27 and 47 with the official Python client: jobs stopped, held, gone on with; models."""

from __future__ import annotations

import base64
import csv
import io

import openai
from harness import raises, run, until

client = openai.OpenAI()
jobs = client.fine_tuning.jobs
TERMINAL = ("succeeded", "failed", "cancelled")


def begin(given, epochs, **asked):
    numbers = {"n_epochs": epochs, "batch_size": 1, "learning_rate_multiplier": 0.1}
    method = {"type": "supervised", "supervised": {"hyperparameters": numbers}}
    return jobs.create(model="tiny", training_file=given["training"], method=method, **asked).id


def steps(job):
    return [event.data["step"] for event in jobs.list_events(job, limit=100) if event.type == "metrics"][::-1]


def check_21_cancel_and_cancel_again(given):
    job = begin(given, 50)
    until(lambda: len(steps(job)) > 2, 240, 0.3)
    made = jobs.cancel(job)
    assert made.fine_tuned_model is None
    until(lambda: jobs.retrieve(job).status == "cancelled", 10)

    def refused():
        try:
            jobs.cancel(job)
        except openai.BadRequestError:
            return True
        return False

    until(refused, 10)
    assert jobs.retrieve(job).fine_tuned_model is None
    reached = len(steps(job))
    assert reached < 600
    with raises(openai.BadRequestError):
        jobs.pause(job)
    with raises(openai.BadRequestError):
        jobs.resume(job)


def check_22_pause_and_resume(given):
    job = begin(given, 30)
    until(lambda: len(steps(job)) > 2, 240, 0.3)
    jobs.pause(job)
    until(lambda: jobs.retrieve(job).status == "paused", 30)
    kept = jobs.checkpoints.list(job).data
    at = kept[0].step_number
    assert steps(job)[-1] <= at < 360, (steps(job)[-1], at)
    answer = client.chat.completions.create(
        model=kept[0].fine_tuned_model_checkpoint, messages=[{"role": "user", "content": "colour 1?"}], max_tokens=3
    )
    assert answer.model == kept[0].fine_tuned_model_checkpoint
    assert jobs.resume(job).status in ("queued", "running")
    done = until(lambda: (found := jobs.retrieve(job)).status in TERMINAL and found, 240)
    assert done.status == "succeeded", done.error
    text = base64.b64decode(client.files.content(done.result_files[0]).read()).decode()
    assert [row["step"] for row in csv.DictReader(io.StringIO(text))] == [str(n) for n in range(1, 361)]
    told = steps(job)
    assert told == sorted(set(told)), "a step was told twice"


def models(tuned):
    names = [model.id for model in client.models.list()]
    assert {"tiny", tuned} <= set(names)
    assert client.models.retrieve(tuned).id == tuned
    assert client.models.retrieve("tiny").object == "model"
    gone = client.models.delete(tuned)
    assert (gone.deleted, gone.id, gone.object) == (True, tuned, "model")
    with raises(openai.NotFoundError) as error:
        client.chat.completions.create(model=tuned, messages=[{"role": "user", "content": "hi"}])
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with raises(openai.NotFoundError):
        client.models.retrieve(tuned)
    with raises(openai.PermissionDeniedError):
        client.models.delete("tiny")


def check_27_47_training_goes_on_from_a_tuned_model(given):
    first = until(lambda: (found := jobs.retrieve(given["jobs"]["named"]["id"])).status in TERMINAL and found, 240)
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 4}}}
    second = jobs.create(
        model=first.fine_tuned_model, training_file=given["training"], seed=7, suffix="more", method=method
    ).id
    done = until(lambda: (found := jobs.retrieve(second)).status in TERMINAL and found, 240)
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model.startswith("ft:tiny:luthier:more:"), done.fine_tuned_model

    def loss(job):
        text = base64.b64decode(client.files.content(job.result_files[0]).read()).decode()
        return float(next(csv.DictReader(io.StringIO(text)))["train_loss"])

    assert loss(done) < loss(first), (loss(done), loss(first))
    models(done.fine_tuned_model)


run(globals())

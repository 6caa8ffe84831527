"""Acceptance checks 11-20, 23-26 and 30 with the official Python client: jobs that submit.py began."""

from __future__ import annotations

import base64
import csv
import io
import math
import re

import openai
from harness import Missing, raises, run, until

client = openai.OpenAI()
TERMINAL = ("succeeded", "failed", "cancelled")


def ended(given, name):
    job = given["jobs"][name]["id"]
    return until(lambda: (found := client.fine_tuning.jobs.retrieve(job)).status in TERMINAL and found, 240)


def succeeded(given, name):
    job = ended(given, name)
    assert job.status == "succeeded", (job.status, job.error)
    return job


def table(job):
    """The result file's rows, decoded as the cookbook does."""
    text = base64.b64decode(client.files.content(job.result_files[0]).read()).decode()
    return list(csv.DictReader(io.StringIO(text)))


def losses(job):
    return [row["train_loss"] for row in table(job)]


def messages(job):
    return [event.message for event in client.fine_tuning.jobs.list_events(job, limit=100)][::-1]


def check_11_a_job_with_only_what_is_required(given):
    first = given["jobs"]["bare"]
    assert first["status"] in ("validating_files", "queued")
    assert isinstance(first["seed"], int)
    assert set(first["hyperparameters"].values()) == {"auto"}, first["hyperparameters"]
    assert (first["fine_tuned_model"], first["finished_at"], first["trained_tokens"]) == (None, None, None)
    job = succeeded(given, "bare")
    assert re.fullmatch(r"ft:tiny:luthier::[A-Za-z0-9]{8}", job.fine_tuned_model), job.fine_tuned_model
    assert job.finished_at >= job.created_at
    assert job.trained_tokens > 0
    numbers = (job.hyperparameters.n_epochs, job.hyperparameters.batch_size)
    assert all(isinstance(number, int) for number in numbers), numbers
    assert isinstance(job.hyperparameters.learning_rate_multiplier, int | float)
    assert job.object == "fine_tuning.job"


def check_12_suffix_and_seed(given):
    named = succeeded(given, "named")
    assert re.fullmatch(r"ft:tiny:luthier:my-model:[A-Za-z0-9]{8}", named.fine_tuned_model), named.fine_tuned_model
    assert named.seed == 7
    assert losses(named) == losses(succeeded(given, "repeat"))
    with raises(openai.BadRequestError) as error:
        client.fine_tuning.jobs.create(model="tiny", training_file=given["training"], suffix="s" * 65)
    assert error.value.param == "suffix"


def check_13_too_few_rows(given):
    job = ended(given, "toy")
    assert (job.status, job.error.code, job.error.param) == ("failed", "invalid_n_examples", "training_file")
    assert "5 example" in job.error.message
    events = list(client.fine_tuning.jobs.list_events(job.id))
    assert [event.message for event in events if event.level == "error"] == [job.error.message]


def check_14_files_of_another_method(given):
    for name, which, found, method in (
        ("dpo-chat", "training", "fine-tune-chat", "dpo"),
        ("dpo-held-out-chat", "validation", "fine-tune-chat", "dpo"),
        ("pairs-supervised", "training", "fine-tune-preference", "supervised"),
    ):
        job = ended(given, name)
        assert (job.status, job.error.code) == ("failed", f"invalid_{which}_file"), (name, job.error)
        assert job.error.param == f"{which}_file"
        assert f"in the {found} format, but the method is {method}" in job.error.message, job.error.message


def check_14_dpo_in_both_spellings(given):
    """The two files say the same, so the two jobs learn the same."""
    first = given["jobs"]["dpo"]
    assert (first["hyperparameters"], first["method"]["type"]) == (None, "dpo")
    asked = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": "auto", "beta": 0.1}
    assert first["method"]["dpo"]["hyperparameters"] == asked
    job = succeeded(given, "dpo")
    assert re.fullmatch(r"ft:tiny:luthier:preferred:[A-Za-z0-9]{8}", job.fine_tuned_model), job.fine_tuned_model
    assert (job.hyperparameters, job.method.type, job.method.supervised) == (None, "dpo", None)
    assert job.method.dpo.hyperparameters.to_dict() == {**asked, "learning_rate_multiplier": 1.0}
    assert job.trained_tokens > 0
    assert losses(job) == losses(succeeded(given, "dpo-completion"))


def check_14_dpo_tells_how_pairs_are_judged(given):
    job = succeeded(given, "dpo")
    rows = table(job)
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 10)]
    assert abs(float(rows[0]["train_loss"]) - math.log(2)) < 1e-3, rows[0]  # nothing is learnt yet: the two are even
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    for row in rows:
        assert (row["train_mean_token_accuracy"], row["full_valid_mean_token_accuracy"]) == ("", ""), row
        assert 0 <= float(row["train_reward_accuracy"]) <= 1 and row["train_accuracy"] == row["train_reward_accuracy"]
        assert math.isfinite(float(row["train_reward_margin"])), row
    assert 0 <= float(rows[-1]["full_valid_reward_accuracy"]) <= 1
    events = [event for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    assert [event.data["step"] for event in events] == list(range(9, 0, -1))
    assert "training reward accuracy=" in events[0].message, events[0].message
    assert 0 <= events[0].data["train_preference_accuracy"] <= 1
    said = messages(job.id)
    assert said[-2:] == [f"New fine-tuned model created: {job.fine_tuned_model}", "The job has successfully completed"]
    assert not any("two answers" in message for message in said), said


def check_14_checkpoints_of_dpo_are_models(given):
    job = succeeded(given, "dpo")
    kept = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert [one.step_number for one in kept] == [9, 6, 3]
    for one in kept:
        assert one.metrics.train_loss > 0 and one.metrics.full_valid_loss > 0
        assert (one.metrics.train_mean_token_accuracy, one.metrics.full_valid_mean_token_accuracy) == (None, None)
        assert 0 <= one.metrics.to_dict()["full_valid_reward_accuracy"] <= 1
    for name in (job.fine_tuned_model, kept[-1].fine_tuned_model_checkpoint):
        answer = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "colour 1?"}], max_tokens=4, temperature=0
        )
        assert answer.model == name


def check_14_dpo_goes_on_from_a_tuned_model(given):
    """Imitation first, preference after it, as the guides advise."""
    parent = succeeded(given, "bare").fine_tuned_model
    method = {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 1, "batch_size": 12}}}
    made = client.fine_tuning.jobs.create(model=parent, training_file=given["preferences"], method=method)
    job = until(lambda: (found := client.fine_tuning.jobs.retrieve(made.id)).status in TERMINAL and found, 240)
    assert job.status == "succeeded", job.error
    assert re.fullmatch(r"ft:tiny:luthier::[A-Za-z0-9]{8}", job.fine_tuned_model) and job.fine_tuned_model != parent
    assert job.method.dpo.hyperparameters.beta == 0.1  # what auto comes to
    [row] = table(job)
    assert abs(float(row["train_loss"]) - math.log(2)) < 1e-3, row  # the tuned model is what it is compared with


def check_15_the_row_without_a_role_is_named(given):
    job = ended(given, "roleless")
    assert (job.status, job.error.code) == ("failed", "invalid_training_file")
    assert "Example 11" in job.error.message, job.error.message


def check_16_weights(given):
    assert [ended(given, name).status for name in ("weight2", "weightuser")] == ["failed", "failed"]
    assert "Example 4" in ended(given, "weight2").error.message
    muted, heard = succeeded(given, "muted"), succeeded(given, "heard")
    assert losses(muted) != losses(heard)


def check_17_drone_training(given):
    if "drone" not in given["jobs"]:
        raise Missing("drone_training.jsonl")
    job = succeeded(given, "drone")
    assert re.fullmatch(r"ft:tiny:luthier:drone:[A-Za-z0-9]{8}", job.fine_tuned_model), job.fine_tuned_model
    assert job.hyperparameters.n_epochs == 3, job.hyperparameters
    assert len(table(job)) == math.ceil(103 * 3 / job.hyperparameters.batch_size)


def check_18_lists_page_by_themselves_and_filter(given):
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=1)]
    made = [job["id"] for job in given["jobs"].values()]
    assert [one for one in listed if one in made] == made[::-1]
    assert len(set(listed)) == len(listed)
    found = [job.id for job in client.fine_tuning.jobs.list(metadata={"odd key": "x&y=z"})]
    assert found == [given["jobs"]["named"]["id"]], found
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"set": "none"})] == []
    bare = {job.id for job in client.fine_tuning.jobs.list(extra_query={"metadata": "null"}, limit=100)}
    assert given["jobs"]["bare"]["id"] in bare
    assert given["jobs"]["named"]["id"] not in bare


def check_19_events_in_order(given):
    job = succeeded(given, "named")
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))[::-1]
    assert len({event.id for event in events}) == len(events)
    assert [event.created_at for event in events] == sorted(event.created_at for event in events)
    said = [event.message for event in events]
    wanted = [
        f"Created fine-tuning job: {job.id}",
        "Validating training file: ",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 1/9: training loss=",
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    places = [next(n for n, message in enumerate(said) if message.startswith(start)) for start in wanted]
    assert places == sorted(places), said
    assert places[0] == 0 and places[-1] == len(said) - 1
    steps = [event.data["step"] for event in events if event.type == "metrics"]
    assert steps == list(range(1, 10)), steps
    assert all(event.object == "fine_tuning.job.event" for event in events)


def check_20_checkpoints_are_models(given):
    job = succeeded(given, "named")
    kept = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    steps = [one.step_number for one in kept]
    assert steps == sorted(steps, reverse=True) and len(steps) == 3, steps
    for one in kept:
        name = one.fine_tuned_model_checkpoint
        assert name == job.fine_tuned_model or name.endswith(f":ckpt-step-{one.step_number}"), name
        answer = client.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "colour 1?"}], max_tokens=4, temperature=0
        )
        assert answer.model == name
        assert one.metrics.train_loss > 0
        assert one.metrics.full_valid_loss is None or one.metrics.full_valid_loss > 0
    assert any(one.metrics.full_valid_loss for one in kept), [one.metrics for one in kept]


def check_23_the_result_file_is_base64_of_numbers(given):
    job = succeeded(given, "named")
    rows = table(job)
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 10)]
    assert list(rows[0])[:5] == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    for row in rows:
        assert all(cell == "" or math.isfinite(float(cell)) for cell in row.values()), row
    assert any(row["full_valid_loss"] for row in rows)
    assert client.files.retrieve(job.result_files[0]).purpose == "fine-tune-results"


def check_24_integrations(given):
    wandb = {"type": "wandb", "wandb": {"project": "p", "entity": "e", "name": "n", "tags": ["one", "two"]}}
    job = client.fine_tuning.jobs.retrieve(given["jobs"]["toy"]["id"])
    assert [one.to_dict() for one in job.integrations] == [wandb]
    with raises(openai.BadRequestError):
        client.fine_tuning.jobs.create(model="tiny", training_file=given["training"], integrations=[{"type": "other"}])


def check_25_what_is_not_there(given):
    def create(**asked):
        return client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": given["training"], **asked})

    with raises(openai.BadRequestError) as error:
        create(training_file="file-" + "x" * 24)
    assert error.value.param == "training_file"
    with raises(openai.BadRequestError) as error:
        create(validation_file="file-" + "x" * 24)
    assert error.value.param == "validation_file"
    other = client.files.create(file=("b.jsonl", b'{"a": 1}\n'), purpose="batch").id
    with raises(openai.BadRequestError) as error:
        create(training_file=other)
    assert error.value.param == "training_file"
    for model in ("ft:tiny:luthier::nothere1", "ft:other", "../tiny"):
        with raises(openai.APIStatusError) as error:
            create(model=model)
        assert (error.value.status_code in (400, 404), error.value.param) == (True, "model"), error.value


def check_26_numbers_out_of_range_are_named(given):
    for name, value in {"n_epochs": 51, "batch_size": 257, "learning_rate_multiplier": 0}.items():
        for asked in (
            {"hyperparameters": {name: value}},
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {name: value}}}},
        ):
            with raises(openai.BadRequestError) as error:
                client.fine_tuning.jobs.create(model="tiny", training_file=given["training"], **asked)
            assert error.value.param.endswith(name), error.value.param
    for kind, beta in (("dpo", 0), ("dpo", 2.1), ("dpo", 3), ("dpo", "x"), ("supervised", 0.1)):
        method = {"type": kind, kind: {"hyperparameters": {"beta": beta}}}
        with raises(openai.BadRequestError) as error:
            client.fine_tuning.jobs.create(model="tiny", training_file=given["training"], method=method)
        assert error.value.param == f"method.{kind}.hyperparameters.beta", error.value.param


def check_28_reinforcement_is_refused(given):
    grader = {
        "type": "string_check",
        "name": "g",
        "input": "{{sample.output_text}}",
        "reference": "x",
        "operation": "eq",
    }
    method = {"type": "reinforcement", "reinforcement": {"grader": grader}}
    with raises(openai.BadRequestError) as error:
        client.fine_tuning.jobs.create(model="tiny", training_file=given["training"], method=method)
    assert error.value.param.startswith("method")


def check_30_permissions(given):
    job = succeeded(given, "named")
    permissions = client.fine_tuning.checkpoints.permissions
    name = client.fine_tuning.jobs.checkpoints.list(job.id).data[-1].fine_tuned_model_checkpoint
    made = permissions.create(name, project_ids=["proj_one", "proj_two"]).data
    assert [one.project_id for one in made] == ["proj_one", "proj_two"]
    assert all(one.object == "checkpoint.permission" for one in made)
    asked = permissions.list if hasattr(permissions, "list") else permissions.retrieve
    listed = asked(name)
    found = {one.id for one in listed.data}
    assert {one.id for one in made} <= found
    for one in made:
        assert permissions.delete(one.id, fine_tuned_model_checkpoint=name).deleted is True
    assert not {one.id for one in made} & {one.id for one in asked(name).data}


run(globals())

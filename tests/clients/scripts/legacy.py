"""Acceptance checks 4, 5, 23, 38, 39, 41 and two notebooks with the Python client of before 1.0 (0.28.1, 0.27.8)."""

from __future__ import annotations

import json
import os

import openai
from harness import raises, run, until

openai.api_base = os.environ["OPENAI_API_BASE"]
TERMINAL = ("succeeded", "failed", "cancelled")
LATE = openai.VERSION.startswith("0.28")


def upload(path):
    with open(path, "rb") as handle:
        return openai.File.create(file=handle, purpose="fine-tune")


def check_04_05_a_file_without_a_name(given):
    made = upload(given["train"])
    assert type(made).__name__ == "File", type(made)
    assert made.filename == "file", made.filename
    assert openai.File.retrieve(made.id).status == "processed"
    if LATE:
        assert openai.File.wait_for_processing(made.id) == "processed"
    assert made.id in [one.id for one in openai.File.list().data]
    with open(given["train"], "rb") as handle:
        assert openai.File.download(made.id) == handle.read()
    assert openai.File.delete(made.id).deleted is True
    with raises(openai.error.InvalidRequestError) as error:
        openai.File.retrieve(made.id)
    assert (error.value.http_status, error.value.param) == (404, "id")


def check_23_a_fine_tuning_job_and_its_events(given):
    if not LATE:
        return
    name = given["jobs"]["named"]["id"]
    job = until(lambda: (found := openai.FineTuningJob.retrieve(name)).status in TERMINAL and found, 240)
    assert job.status == "succeeded"
    text = openai.File.download(job.result_files[0]).decode()
    assert text.startswith("step,train_loss,train_accuracy"), text[:80]
    events, after = [], None
    while True:
        page = openai.FineTuningJob.list_events(id=job.id, limit=2, **({"after": after} if after else {}))
        events += page.data
        if not page.has_more:
            break
        after = page.data[-1].id
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert len({event.id for event in events}) == len(events) > 9
    with raises(openai.error.InvalidRequestError) as error:
        openai.FineTuningJob.retrieve("ftjob-nothere")
    assert error.value.code == "fine_tune_not_found"


def check_38_classification_needs_a_validation_file(given):
    training = upload(given["pairs"]).id
    for asked in (
        {"compute_classification_metrics": True, "classification_positive_class": " a"},
        {"compute_classification_metrics": True, "validation_file": training},
    ):
        with raises(openai.error.InvalidRequestError):
            openai.FineTune.create(training_file=training, **asked)


def check_39_completions_of_a_legacy_model(given):
    done = until(lambda: (found := openai.FineTune.retrieve(given["legacy_job"])).status in TERMINAL and found, 240)
    assert done.status == "succeeded", done
    model = done.fine_tuned_model
    assert ":ft-" in model and model.count(":") >= 1, model
    answer = openai.Completion.create(
        model=model, prompt="the quick fox 1\n\n###\n\n", max_tokens=1, temperature=0, logprobs=2
    )
    assert answer.object == "text_completion"
    assert answer.model == model
    top = answer.choices[0].logprobs.top_logprobs[0]
    assert len(top) == 2, top
    assert answer.choices[0].logprobs.tokens[0] in top
    by_engine = openai.Completion.create(
        engine=model, prompt="the quick fox 1\n\n###\n\n", max_tokens=1, temperature=0, logprobs=2
    )
    assert by_engine.choices[0].text == answer.choices[0].text
    asked = {"model": model, "prompt": "a lazy", "max_tokens": 3, "temperature": 0}
    whole = openai.Completion.create(**asked).choices[0]
    streamed = list(openai.Completion.create(stream=True, **asked))
    assert all(chunk.object == "text_completion" for chunk in streamed)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.text
    assert streamed[-1].choices[0].finish_reason == whole.finish_reason in ("length", "stop")
    several = openai.Completion.create(model=model, prompt=["a", "b"], n=2, max_tokens=2, echo=True)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text.startswith("a") and several.choices[3].text.startswith("b")
    assert model in [engine.id for engine in openai.Engine.list().data]
    assert openai.Model.retrieve(model).id == model


def check_04_41_the_notebook_with_weights_and_biases(given):
    """Call by call, in its style (section 6.6): files without names, a job, its events, a chat with its model."""
    if not LATE:
        return
    training, validation = upload(given["train"]), upload(given["valid"])
    assert training["filename"] == validation["filename"] == "file"
    made = openai.FineTuningJob.create(
        training_file=training["id"],
        validation_file=validation["id"],
        model="gpt-3.5-turbo",
        hyperparameters={"n_epochs": 2},
    )
    assert (made["object"], made["status"]) == ("fine_tuning.job", "validating_files"), made
    state = openai.FineTuningJob.retrieve(made["id"])
    assert [state[name] for name in ("trained_tokens", "finished_at", "fine_tuned_model")] == [None, None, None]
    assert state["hyperparameters"]["n_epochs"] == 2
    done = until(lambda: (found := openai.FineTuningJob.retrieve(made["id"]))["status"] in TERMINAL and found, 240)
    assert done["status"] == "succeeded", done
    assert done["trained_tokens"] > 0
    events = openai.FineTuningJob.list_events(id=made["id"], limit=5)["data"]
    events.reverse()
    said = [event["message"] for event in events]
    assert said[-2:] == [
        f"New fine-tuned model created: {done['fine_tuned_model']}",
        "The job has successfully completed",
    ], said
    assert len(said) == 5
    answer = openai.ChatCompletion.create(
        model=done["fine_tuned_model"], messages=[{"role": "user", "content": "colour 1?"}], temperature=0, max_tokens=9
    )
    assert isinstance(answer["choices"][0]["message"]["content"], str)
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]
    assert openai.FineTuningJob.list(limit=1).data[0].id
    with raises(openai.error.InvalidRequestError) as error:
        openai.FineTuningJob.cancel(made["id"])
    assert error.value.http_status == 400


def check_41_questions_and_answers_with_stops(given):
    """The olympics notebook's questions: several stops, log-probabilities, an answer that never holds a stop."""
    done = until(lambda: (found := openai.FineTune.retrieve(given["legacy_job"])).status in TERMINAL and found, 240)
    asked = {"model": done.fine_tuned_model, "prompt": "the quick fox 1\n\n###\n\n", "temperature": 0, "max_tokens": 20}
    free = openai.Completion.create(**asked).choices[0].text
    answer = openai.Completion.create(**asked, stop=[".", "\n"], logprobs=2, n=1, top_p=1, echo=False).choices[0]
    assert answer.text == free.split("\n")[0].split(".")[0], (answer.text, free)
    assert "".join(answer.logprobs.tokens).startswith(answer.text) or "bytes:" in "".join(answer.logprobs.tokens)
    assert all(len(top) in (2, 3) for top in answer.logprobs.top_logprobs)


def check_41_chat_streams(given):
    asked = {"messages": [{"role": "user", "content": "colour 1?"}], "max_tokens": 5, "temperature": 0}
    whole = openai.ChatCompletion.create(model="tiny", **asked)
    chunks = list(openai.ChatCompletion.create(model="tiny", stream=True, **asked))
    said = "".join(chunk.choices[0].delta.get("content", "") for chunk in chunks)
    assert said == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    by_engine = openai.ChatCompletion.create(engine="tiny", **asked)
    assert by_engine.choices[0].message.content == said
    with raises(openai.error.InvalidRequestError) as error:
        openai.ChatCompletion.create(model="nothere:x", messages=[{"role": "user", "content": "x"}])
    assert error.value.code == "model_not_found"
    with raises(openai.error.AuthenticationError):
        openai.Model.list(api_key="sk-wrong")


def check_41_the_async_client(given):
    import asyncio

    async def both():
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        first = await openai.ChatCompletion.acreate(**asked)
        stream = await openai.ChatCompletion.acreate(stream=True, **asked)
        return first, [chunk async for chunk in stream]

    first, chunks = asyncio.run(both())
    assert first.choices[0].finish_reason == "length"
    assert chunks[-1].choices[0].finish_reason == "length"
    assert json.loads(str(first))["object"] == "chat.completion"


run(globals())

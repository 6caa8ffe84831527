"""The cookbook's notebooks, call by call, in their module-level style. Model names are the notebooks' own.

Chat fine-tuning (6.1), preferences (6.3), function calling (6.4), transactions and the distillation notebook's end
(6.6).
"""

from __future__ import annotations

import base64
import csv
import io
import json

import openai
from harness import Missing, run, until

TERMINAL = ("succeeded", "failed", "cancelled")
FUNCTIONS = [
    {
        "type": "function",
        "function": {
            "name": "takeoff_drone",
            "description": "Initiate the drone's takeoff sequence.",
            "parameters": {
                "type": "object",
                "properties": {"altitude": {"type": "integer", "description": "Altitude in meters."}},
                "required": ["altitude"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "land_drone",
            "description": "Land the drone.",
            "parameters": {
                "type": "object",
                "properties": {"location": {"type": "string", "enum": ["current", "home_base", "custom"]}},
                "required": ["location"],
            },
        },
    },
]


def finished(job):
    done = until(lambda: (found := openai.fine_tuning.jobs.retrieve(job)).status in TERMINAL and found, 480)
    assert done.status == "succeeded", done.error
    return done


def check_11_how_to_finetune_chat_models(given):
    with open(given["train"], "rb") as handle:
        training = openai.files.create(file=handle, purpose="fine-tune").id
    with open(given["valid"], "rb") as handle:
        validation = openai.files.create(file=handle, purpose="fine-tune").id
    made = openai.fine_tuning.jobs.create(
        training_file=training, validation_file=validation, model="gpt-3.5-turbo", suffix="recipe-ner"
    )
    assert made.status in ("validating_files", "queued")
    assert openai.fine_tuning.jobs.retrieve(made.id).trained_tokens is None
    done = finished(made.id)
    events = openai.fine_tuning.jobs.list_events(made.id).data
    events.reverse()
    said = [event.message for event in events]
    assert len(said) == 20
    assert any(m.startswith("Step ") and "training loss=" in m and "validation loss=" in m for m in said), said
    assert said[-2:] == [f"New fine-tuned model created: {done.fine_tuned_model}", "The job has successfully completed"]
    assert done.fine_tuned_model.split(":")[0] == "ft" and ":recipe-ner:" in done.fine_tuned_model
    asked = [
        {"role": "system", "content": "You are a helpful recipe assistant."},
        {"role": "user", "content": "Title: Beef Brisket\n\nIngredients: ['4 lb. brisket']\n\nGeneric ingredients: "},
    ]
    answer = openai.chat.completions.create(model=done.fine_tuned_model, messages=asked, temperature=0, max_tokens=500)
    assert isinstance(answer.choices[0].message.content, str)


def check_17_fine_tuning_for_function_calling(given):
    if "drone" not in given["jobs"]:
        raise Missing("drone_training.jsonl")
    job = finished(given["jobs"]["drone"]["id"])
    result = openai.files.retrieve(job.result_files[0]).id
    content = openai.files.content(result).read()
    decoded = base64.b64decode(content).decode("utf-8")
    assert decoded.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy")
    asked = {
        "model": job.fine_tuned_model,
        "messages": [
            {"role": "system", "content": "You are an intelligent AI that controls a drone."},
            {"role": "user", "content": "Let's get the drone in the air, how high should it go?"},
        ],
        "tools": FUNCTIONS,
        "tool_choice": "required",
        "temperature": 0,
        "seed": 42,
        "max_tokens": 500,
        "stop": None,
    }
    message = openai.chat.completions.create(**asked).choices[0].message
    assert message.tool_calls[0].function.name in ("takeoff_drone", "land_drone"), message
    assert job.id in [one.id for one in openai.fine_tuning.jobs.list(limit=10)]
    assert openai.fine_tuning.jobs.list_events(job.id, limit=10).data[0].message == "The job has successfully completed"


def check_11_multiclass_classification_for_transactions(given):
    """Section 6.6: labelled transactions as a chat data set, a job that names nothing but its files, a test set."""
    if "transactions" not in given:
        raise Missing("labelled_transactions.csv")
    with open(given["transactions"], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["Classification"] for row in rows})
    prompt = "You classify the transactions of a library into one of: " + ", ".join(classes)

    def turns(row):
        asked = f"Supplier: {row['Supplier']}\nDescription: {row['Description']}\nValue: {row['Transaction value (£)']}"
        return [{"role": "system", "content": prompt}, {"role": "user", "content": asked}]

    def file(part, name):
        lines = [{"messages": [*turns(row), {"role": "assistant", "content": row["Classification"]}]} for row in part]
        content = "\n".join(json.dumps(line) for line in lines).encode()  # no newline at the end
        return openai.files.create(file=(name, content), purpose="fine-tune").id

    training, validation, test = rows[:24], rows[24:30], rows[30:34]
    made = openai.fine_tuning.jobs.create(
        training_file=file(training, "train.jsonl"),
        validation_file=file(validation, "valid.jsonl"),
        model="gpt-3.5-turbo",
    )
    done = finished(made.id)
    assert done.hyperparameters.n_epochs == 4, done.hyperparameters  # 24 rows: as many epochs as come near to 100
    for row in test:
        answer = openai.chat.completions.create(
            model=done.fine_tuned_model, messages=turns(row), temperature=0, max_tokens=8
        )
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.model == done.fine_tuned_model


def check_14_direct_preference_optimization_guide(given):
    """Section 6.3 without its evals and responses, which this server does not have: files that are made in memory."""
    pairs = [
        {
            "input": {"messages": [{"role": "user", "content": f"The quick question {n}"}]},
            "preferred_output": [{"role": "assistant", "content": f"the short answer {n}"}],
            "non_preferred_output": [{"role": "assistant", "content": "the quick brown fox jumps over the lazy dog"}],
        }
        for n in range(30)
    ]

    def upload(part, name):
        file = io.BytesIO("\n".join(json.dumps(pair) for pair in part).encode("utf-8"))  # no newline at the end
        file.name = name
        return openai.files.create(file=file, purpose="fine-tune")

    made = openai.fine_tuning.jobs.create(
        model="gpt-4.1-mini-2025-04-14",
        training_file=upload(pairs[:24], "train.jsonl").id,
        validation_file=upload(pairs[24:27], "val.jsonl").id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2, "beta": 0.1, "batch_size": 8}}},
    )
    done = finished(made.id)
    assert done.method.dpo.hyperparameters.to_dict() == {
        "n_epochs": 2,
        "beta": 0.1,
        "batch_size": 8,
        "learning_rate_multiplier": 1.0,
    }
    decoded = base64.b64decode(openai.files.content(done.result_files[0]).read()).decode("utf-8")
    assert [row["step"] for row in csv.DictReader(io.StringIO(decoded))] == [str(step) for step in range(1, 7)]
    for pair in pairs[27:]:
        answer = openai.chat.completions.create(
            model=done.fine_tuned_model, messages=pair["input"]["messages"], temperature=0, max_tokens=8
        )
        assert isinstance(answer.choices[0].message.content, str)


def check_54_distillation_with_the_tuned_model(given):
    job = finished(given["jobs"]["named"]["id"])
    enum = [f"Grape {n}" for n in range(75)]
    form = {
        "type": "json_schema",
        "json_schema": {
            "name": "grape-variety",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"variety": {"type": "string", "enum": enum}},
                "required": ["variety"],
                "additionalProperties": False,
            },
        },
    }
    answer = openai.chat.completions.create(
        model=job.fine_tuned_model,
        messages=[{"role": "user", "content": "Which grape?"}],
        response_format=form,
        store=True,
        metadata={"distillation": "wine"},
        max_tokens=60,
    )
    assert json.loads(answer.choices[0].message.content)["variety"] in enum
    assert answer.id in [one.id for one in openai.chat.completions.list(metadata={"distillation": "wine"})]


run(globals())

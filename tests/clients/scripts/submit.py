"""Submits the jobs that the checks share, with the official client; prints name -> job, as it was when created."""

from __future__ import annotations

import copy
import json
import sys

import openai

sys.path.insert(0, sys.argv[2])
import rows

client = openai.OpenAI()
given = json.loads(sys.argv[1])
jobs = {}


def upload(content: list, name: str) -> str:
    return client.files.create(file=(name, rows.jsonl(content)), purpose="fine-tune").id


def submit(name: str, training: str, **asked) -> None:
    job = client.fine_tuning.jobs.create(model=asked.pop("model", "tiny"), training_file=training, **asked)
    jobs[name] = json.loads(job.to_json())


chat = rows.chat()
training, validation = upload(chat, "train.jsonl"), upload(rows.chat(4, first=20), "valid.jsonl")
short = {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 4}}}}

submit(
    "named",
    training,
    validation_file=validation,
    suffix="My Model!",
    seed=7,
    metadata={"set": "a", "odd key": "x&y=z"},
    **short,
)
submit("bare", training)
submit("repeat", training, validation_file=validation, seed=7, metadata={"set": "b"}, **short)
muted = copy.deepcopy(chat)
muted[0]["messages"][-1]["weight"] = 0
muted[0]["messages"] += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "no", "weight": 1}]
heard = copy.deepcopy(muted)
heard[0]["messages"][2]["weight"] = 1
submit("muted", upload(muted, "muted.jsonl"), seed=7, **short)
submit("heard", upload(heard, "heard.jsonl"), seed=7, **short)

dpo = {"method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 3, "batch_size": 4, "beta": 0.1}}}}
pairs = upload(rows.preferences(), "pairs.jsonl")
held_out = upload(rows.preferences(4, first=20), "held-out.jsonl")
submit("dpo", pairs, validation_file=held_out, suffix="preferred", seed=7, **dpo)
submit("dpo-completion", upload(rows.preferences(spelling="completion"), "pairs2.jsonl"), seed=7, **dpo)
submit("dpo-chat", training, **dpo)
submit("dpo-held-out-chat", pairs, validation_file=validation, method={"type": "dpo"})
submit("pairs-supervised", pairs)

bad = copy.deepcopy(chat)
del bad[10]["messages"][1]["role"]
submit("roleless", upload(bad, "roleless.jsonl"))
for name, row, place, weight in [("weight2", 3, -1, 2), ("weightuser", 4, 1, 1)]:
    bad = copy.deepcopy(chat)
    bad[row]["messages"][place]["weight"] = weight
    submit(name, upload(bad, f"{name}.jsonl"))

wandb = {"type": "wandb", "wandb": {"project": "p", "entity": "e", "name": "n", "tags": ["one", "two"]}}
toy = given.get("toy")
with open(toy, "rb") if toy else open("/dev/null", "rb") as file:
    five = file.read() or rows.jsonl(rows.chat(5))
submit("toy", client.files.create(file=("toy.jsonl", five), purpose="fine-tune").id, integrations=[wandb])
if given.get("drone"):
    with open(given["drone"], "rb") as file:
        drone = client.files.create(file=file, purpose="fine-tune")
    submit("drone", drone.id, model="gpt-3.5-turbo", suffix="drone")
print(json.dumps({"jobs": jobs, "training": training, "validation": validation, "preferences": pairs}))

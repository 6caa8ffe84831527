"""Acceptance check 50 with the official Python client: a stream that says nothing for more than a minute goes on.

The stream is the server's extension for jobs, read by the client's own decoder; the job is held until it is cancelled.
"""

from __future__ import annotations

import threading
import urllib.request

import openai
from harness import run, until

client = openai.OpenAI()
IDLE = 62  # seconds


def raw(path, lines):
    asked = urllib.request.Request(str(client.base_url).rstrip("/") + path)
    asked.add_header("Authorization", f"Bearer {client.api_key}")
    with urllib.request.urlopen(asked, timeout=IDLE + 60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines.extend(line.decode() for line in answer)


def check_50_a_stream_that_is_idle(given):
    jobs = client.fine_tuning.jobs
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 1}}}
    job = jobs.create(model="tiny", training_file=given["training"], method=method).id
    until(lambda: jobs.retrieve(job).status in ("queued", "running"), 120)
    jobs.pause(job)
    until(lambda: jobs.retrieve(job).status == "paused", 120)
    path = f"/fine_tuning/jobs/{job}/events?stream=true"
    lines = []
    reader = threading.Thread(target=raw, args=(path, lines))
    reader.start()
    threading.Timer(IDLE, jobs.cancel, [job]).start()
    stream = client.get(path, cast_to=object, stream=True, stream_cls=openai.Stream[object])
    events = list(stream)
    reader.join(30)
    assert events[0]["message"] == f"Created fine-tuning job: {job}", events[0]
    assert jobs.retrieve(job).status == "cancelled"
    assert lines[-2:] == ["data: [DONE]\n", "\n"], lines[-2:]
    assert sum(line.startswith(":") for line in lines) >= 3, lines
    assert all(line == "\n" or line.startswith(("data: ", ":")) for line in lines), lines
    assert sum(line.startswith("data: {") for line in lines) == len(events)


run(globals())

"""Acceptance check 49: reads a stream whose server is about to break it; prints what the client raised."""

from __future__ import annotations

import json

import openai

client = openai.OpenAI(max_retries=0)
stream = client.chat.completions.create(
    model="tiny",
    messages=[{"role": "user", "content": "hi"}],
    max_tokens=4000,
    stream=True,
    logit_bias={str(token): -100 for token in range(5)},  # the tiny model's special tokens: it goes on to the limit
)
told = {"kind": None}
try:
    for number, _ in enumerate(stream):
        if number == 3:
            print("begun", flush=True)
except openai.OpenAIError as error:
    told = {"kind": type(error).__name__, "message": str(error), "code": getattr(error, "code", None)}
print(json.dumps(told))

"""Acceptance check 54 with the official async client: the distillation notebook's requests, a dozen at a time.

Section 6.6 of the reference: store, metadata, a strict schema with an enum of about 75 strings, many at once.
"""

from __future__ import annotations

import asyncio
import json

import openai
from harness import run

WINES = [f"{colour} {fruit} {n}" for n in range(5) for fruit in ("Noir", "Blanc", "Gris") for colour in "ABCDE"]
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "grape-variety",
        "schema": {
            "type": "object",
            "properties": {"variety": {"type": "string", "enum": WINES}},
            "additionalProperties": False,
            "required": ["variety"],
        },
        "strict": True,
    },
}


async def check_54_a_dozen_at_once(given):
    async with openai.AsyncOpenAI() as client:

        async def one(number):
            answer = await client.chat.completions.create(
                model=given["model"],
                messages=[{"role": "user", "content": f"Which grape is in bottle {number}?"}],
                store=True,
                metadata={"distillation": given["mark"]},
                response_format=SCHEMA,
                temperature=1,
                max_tokens=40,
            )
            return json.loads(answer.choices[0].message.content)

        answers = await asyncio.gather(*(one(n) for n in range(24)))
        assert all(set(answer) == {"variety"} and answer["variety"] in WINES for answer in answers), answers
        kept = [one.id async for one in client.chat.completions.list(metadata={"distillation": given["mark"]})]
        assert len(set(kept)) == len(kept) == 24
        stream = await client.chat.completions.create(
            model=given["model"], messages=[{"role": "user", "content": "hi"}], max_tokens=3, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")


run(globals())

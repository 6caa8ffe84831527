"""Acceptance check 21: cancels a job that is over (argv), with the client's usual retries."""

from __future__ import annotations

import sys

import openai

try:
    openai.OpenAI().fine_tuning.jobs.cancel(sys.argv[1])
except openai.APIStatusError as error:
    print(type(error).__name__)

"""The older API's names for models: /engines. Does not know: how an answer is made."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()

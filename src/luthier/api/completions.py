"""POST /completions: prompts in, their continuations out, whole or as they come."""

from fastapi import APIRouter

router = APIRouter(tags=["completions"])

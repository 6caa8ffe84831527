"""POST /chat/completions: a conversation in, an answer out, whole or as it comes."""

from fastapi import APIRouter

router = APIRouter(tags=["chat"])

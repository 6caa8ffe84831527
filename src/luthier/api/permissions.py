"""Permissions on checkpoints of fine-tuning jobs. Does not know: jobs' states."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()

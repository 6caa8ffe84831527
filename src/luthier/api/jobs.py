"""Fine-tuning jobs at /fine_tuning/jobs. Does not know: workers; what a job's steps are."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter()

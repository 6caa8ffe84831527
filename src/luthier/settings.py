"""The environment, read once into one frozen object. No other file reads os.environ.

Does not know: what a run was asked (spec/job.py); Hugging Face's own variables, which huggingface_hub reads itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Where Luthier keeps its things and whom it may ask. Each field is the variable LUTHIER_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="LUTHIER_", env_ignore_empty=True, frozen=True, extra="ignore")

    home: Path = Field(
        default_factory=lambda: Path.home() / ".luthier", description="Models, caches and locks live under it."
    )
    hub: Literal["auto", "off"] = Field(default="auto", description="Whether the Hugging Face Hub is ever asked.")

    @field_validator("home")
    @classmethod
    def _whole(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def models_dir(self) -> Path:
        return self.home / "models"

    @property
    def cache_dir(self) -> Path:
        return self.home / "cache"


def load_settings() -> Settings:
    """The settings of this process, now. Raises ValueError with a sentence that names the variable."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"LUTHIER_{str(first['loc'][0]).upper()}" if first["loc"] else "A LUTHIER_ variable"
        raise ValueError(f"{name}: found {first['input']!r}; {first['msg']}.") from error


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child process, with `changes` over it."""
    return {**os.environ, **changes}


# Compiled matrix kernels that torch's CPU library may keep, in each of its two caches. It keeps 1,024 by default, one
# for every shape it has met; training meets new shapes at every step, and each kernel keeps its scratch memory: a run
# of the 135M model grew from 1.9 to 3.8 GB in 90 steps. One pass needs about 30 shapes.
KERNEL_CACHE = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


def bound_kernel_caches() -> None:
    """Bound those caches, unless the user has. Takes effect only before torch is imported."""
    for name, value in KERNEL_CACHE.items():
        os.environ.setdefault(name, value)

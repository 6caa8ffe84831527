"""The environment, read once into one frozen object. No other file reads os.environ.

Does not know: what a run was asked (spec/job.py); Hugging Face's own variables, which huggingface_hub reads itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from luthier.spec.bases import DEFAULT_BASE, Bases, read_pairs


class Settings(BaseSettings):
    """Where Luthier keeps its things and whom it may ask. Each field is the variable LUTHIER_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="LUTHIER_", env_ignore_empty=True, frozen=True, extra="ignore")

    home: Path = Field(
        default_factory=lambda: Path.home() / ".luthier", description="Models, caches and locks live under it."
    )
    hub: Literal["auto", "off"] = Field(default="auto", description="Whether the Hugging Face Hub is ever asked.")

    database: str | None = Field(
        default=None, description="SQLAlchemy URL of a PostgreSQL database; default: SQLite under home."
    )
    bases: str = Field(default=DEFAULT_BASE, description="Bases on offer: NAME or NAME=FOLDER, separated by commas.")
    aliases: str = Field(default="", description="Other names for them: ALIAS=BASE, separated by commas.")
    organization: str = Field(default="luthier", description="The organisation in tuned models' names and objects.")
    results: Literal["auto", "raw", "base64"] = Field(
        default="auto", description="How modern result files are served: base64 as OpenAI does, or raw CSV."
    )
    kernels: Literal["auto", "torch"] = Field(
        default="auto",
        description="What computes: kernels compiled here where they can be, or torch's only.",
    )
    requests_per_minute: int = Field(default=3000, ge=1, description="Requests that one key may make in a minute.")
    max_file_bytes: int = Field(default=512 * 2**20, ge=1, description="Largest file that may be uploaded at once.")
    max_body_bytes: int = Field(default=8 * 2**20, ge=1, description="Largest JSON body.")
    replicas: int = Field(default=2, ge=1, description="Bases held in memory at once by the server.")
    adapters: int = Field(default=32, ge=1, description="Adapters held in memory at once by a replica.")

    @field_validator("home")
    @classmethod
    def _whole(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @property
    def offered(self) -> Bases:
        """The bases and aliases of this configuration. Raises ValueError for an alias of nothing."""
        sources = {
            name: str(Path(source).expanduser().absolute()) if "/" in source and Path(source).is_dir() else source
            for name, source in read_pairs(self.bases, "LUTHIER_BASES").items()
        }
        aliases = read_pairs(self.aliases, "LUTHIER_ALIASES")
        for alias, base in aliases.items():
            if base not in sources:
                raise ValueError(f"LUTHIER_ALIASES: {alias} means {base}, which LUTHIER_BASES does not offer.")
        if not sources:
            raise ValueError("LUTHIER_BASES: names no base.")
        return Bases(sources=sources, aliases=aliases, default=next(iter(sources)))

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


def client_environment() -> tuple[str | None, str | None]:
    """(base URL, API key) as OpenAI's own clients take them: OPENAI_BASE_URL and OPENAI_API_KEY."""
    return os.environ.get("OPENAI_BASE_URL") or None, os.environ.get("OPENAI_API_KEY") or None


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child process, with `changes` over it. The database's URL, which may hold a
    password, goes only to a child that `changes` gives it to."""
    inherited = {name: value for name, value in os.environ.items() if name != "LUTHIER_DATABASE"}
    return {**inherited, **changes}


# Compiled matrix kernels that torch's CPU library may keep, in each of its two caches. It keeps 1,024 by default, one
# for every shape it has met; training meets new shapes at every step, and each kernel keeps its scratch memory: a run
# of the 135M model grew from 1.9 to 3.8 GB in 90 steps. One pass needs about 30 shapes.
KERNEL_CACHE = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


def bound_kernel_caches() -> None:
    """Bound those caches, unless the user has. Takes effect only before torch is imported."""
    for name, value in KERNEL_CACHE.items():
        os.environ.setdefault(name, value)


def fix_product_workspace() -> None:
    """Let a GPU's products use room of one size, unless the user has chosen: else two runs of the same numbers may
    differ in the last bits (cuBLAS, "Results reproducibility"). Before the first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def place_among_ranks() -> tuple[int, int]:
    """(number of this process, how many there are) of those that torchrun started on this machine."""
    return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])


# How often a thread that waits for another looks again before it sleeps (libgomp's own unit, here about 0.1 ms): longer
# than the Python between two kernels, shorter than the slice that another process would take.
SPINS = "10000"


def sleep_between_kernels() -> None:
    """Let threads that wait for each other spin a little, then sleep, unless the user has chosen. Before torch loads.

    A step of serving is hundreds of short kernels. Waking a sleeper costs as much as many of them: the 135M model, one
    stream on two idle cores, gave 31 tokens a second asleep, 45 so. But where another process takes a core, threads
    that only spin take turns with it at each kernel (6 tokens a second), so they sleep in the end, and jobs run at a
    low priority (work/launch.py).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)

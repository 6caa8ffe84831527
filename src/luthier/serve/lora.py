"""Adapters of one base: read, checked, kept while used, and applied to rows of a batch that mixes them.

An adapter is its content, never its name: the key that batches and caches see is a hash of its files. PEFT says which
modules it changes and how strongly (its own layers are built on a skeleton without memory), as in training.
Does not know: attention, sequences, where adapters come from.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.engine import adapters
from luthier.engine.sources import read_json, refuse_unsafe
from luthier.spec.errors import BadSetting, NotFound

PACKED_FOR = 16  # rows that a packed weight is made for; it serves any number
FEW = 64  # rows times ranks; up to so many, float32 on one core is quicker than bfloat16 on all (1 x 8: 37 to 158 us)
_packed_linear = torch.ops.mkldnn._linear_pointwise
_packed_sum = torch.ops.mkldnn._linear_pointwise.binary

FILES = (adapters.CONFIG, adapters.WEIGHTS, adapters.NOTE)


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter does to one linear layer: y + B A x, then with DoRA times `gain`. B holds the scaling."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    gain: Tensor | None = None  # [out], DoRA's magnitude over the norm of the changed weight


@dataclass(frozen=True, eq=False)
class Adapter:
    """`key`: hash of the content. `changes` by module name."""

    key: str
    changes: Mapping[str, Change]


@dataclass(frozen=True, slots=True)
class Part:
    """A module's place among the outputs of a (fused) linear layer."""

    name: str
    start: int
    end: int


@dataclass(slots=True)
class Pair:
    """The changes of all active adapters to one fused layer. `owners` says whose each hidden unit is."""

    plain: tuple[Tensor, Tensor] | None  # A [in, ranks] and B [ranks, out] in float32
    packed: tuple[Tensor, Tensor] | None  # A [ranks, in] and B [out, ranks] in bfloat16, as oneDNN's kernels read them
    owners: Tensor  # int [ranks]
    gain: Tensor | None  # [1 + adapters, out]; row 0: the base


@dataclass
class Mix:
    """Adapters stacked for a batch. `who` is set for each step: int [tokens], 0 for the base, else 1 + place."""

    adapters: list[Adapter]
    pairs: list[Pair | None]
    who: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))
    mixed: bool = True
    _strange: dict[int, Tensor] = field(default_factory=dict)

    def set_rows(self, places: Sequence[int]) -> None:
        """`places[t]`: whose token t is."""
        self.who = torch.tensor(places, dtype=torch.int32)
        self.mixed = not (len(self.adapters) == 1 and 0 not in places)
        self._strange.clear()

    def add(self, index: int, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """`y`, the output [tokens, out] of layer `index` for `x`, changed for each row by its own adapter."""
        pair = self.pairs[index]
        if pair is None:
            return y
        few = pair.plain is not None and (pair.packed is None or len(x) * len(pair.owners) <= FEW)
        a, b = pair.plain if few else pair.packed  # type: ignore[misc]  # one of them is there
        hidden = torch.mm(x.float(), a) if few else _packed_linear(x, a, None, "none", [], "")
        if self.mixed:
            # Filled, not multiplied: another row's adapter may overflow, and 0 times infinity is NaN.
            key = id(pair.owners)
            if key not in self._strange:
                self._strange[key] = self.who[:, None] != pair.owners
            hidden.masked_fill_(self._strange[key], 0.0)
        if pair.gain is not None:
            gain = pair.gain[self.who.long()]
            y = y * gain if bias is None else (y - bias) * gain + bias
        return y.add_(torch.mm(hidden, b)) if few else _packed_sum(hidden, y, b, None, "add")


def stack(active: Sequence[Adapter], layout: Sequence[Sequence[Part]], dtype: torch.dtype, packs: bool) -> Mix:
    """The adapters `active` over linear layers whose outputs `layout` names. `packs`: as oneDNN's kernels read them."""
    seen: dict[tuple[int, ...], Tensor] = {}
    return Mix(list(active), [_pair(active, parts, dtype, packs, seen) for parts in layout])


def pack(weight: Tensor) -> Tensor:
    """A bfloat16 weight [out, in] as oneDNN's kernels read it."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
    return packed


def _pair(
    active: Sequence[Adapter],
    parts: Sequence[Part],
    dtype: torch.dtype,
    packs: bool,
    seen: dict[tuple[int, ...], Tensor],
) -> Pair | None:
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    owners: list[int] = []
    width = parts[-1].end
    gain: Tensor | None = None
    for place, adapter in enumerate(active, start=1):
        for part in parts:
            change = adapter.changes.get(part.name)
            if change is None:
                continue
            rows.append(change.a)
            column = torch.zeros(width, change.b.shape[1])
            column[part.start : part.end] = change.b
            columns.append(column)
            owners += [place] * len(change.a)
            if change.gain is not None:
                gain = torch.ones(1 + len(active), width) if gain is None else gain
                gain[place, part.start : part.end] = change.gain
    if not rows:
        return None
    owner = seen.setdefault(tuple(owners), torch.tensor(owners, dtype=torch.int32))
    a, b = torch.cat(rows), torch.cat(columns, dim=1)
    return Pair(
        (a.T, b.T.contiguous()) if len(a) <= FEW or not packs else None,
        (pack(a.to(dtype)), pack(b.to(dtype))) if packs else None,
        owner,
        None if gain is None else gain.to(dtype),
    )


class Shelf:
    """The adapters in memory, the least recently used put away first. Those in use stay with their sequences."""

    def __init__(
        self,
        model: PreTrainedModel,
        weight_of: Callable[[str], Tensor],
        base_hash: Callable[[], str],
        known: set[str],
        limit: int,
    ) -> None:
        """`known`: names of the linear modules that a batch can change; `weight_of` gives the weight of one."""
        self._model, self._weight_of, self._base_hash = model, weight_of, base_hash
        self._known, self.limit = known, limit
        self._kept: OrderedDict[tuple[object, ...], Adapter] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, folder: Path, digest: str | None) -> Adapter:
        """The adapter in `folder` as it is now. Raises NotFound or BadSetting, as engine/adapters.py does."""
        try:
            stamp: list[object] = [str(folder), digest]
            for name in FILES:
                at = (folder / name).stat()
                stamp += [at.st_ino, at.st_size, at.st_mtime_ns]
        except OSError as error:
            raise NotFound(f"The adapter {folder.name} is not here: {error.strerror}.", param="model") from error
        key = tuple(stamp)
        if key not in self._kept:
            self._kept[key] = self._read(folder)
            while len(self._kept) > self.limit:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _read(self, folder: Path) -> Adapter:
        refuse_unsafe(folder)
        wanted = adapters.base_of(folder)
        if wanted.hash != self._base_hash():
            raise BadSetting(
                f"The adapter {folder.name} was trained on another base: this one differs in config, weights or "
                f"tokenizer from the {wanted.name} it needs (content {wanted.hash[:12]}).",
                param="model",
            )
        published = read_json(folder / adapters.NOTE).get("files") or {}
        whole = hashlib.sha256()
        for name in FILES:
            digest = hashlib.sha256((folder / name).read_bytes())
            whole.update(digest.digest())
            if name in published and published[name]["sha256"] != digest.hexdigest():
                raise BadSetting(
                    f"The adapter {folder.name} is damaged: its {name} is not the one that was published.",
                    param="model",
                )
        made, state = adapters.fitted(skeleton(self._model), folder)
        return Adapter(whole.hexdigest(), self._changes(made, state, folder))

    def _changes(self, made: nn.Module, state: Mapping[str, Tensor], folder: Path) -> dict[str, Change]:
        found = {}
        for path, layer in made.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            name = path.removeprefix("base_model.model.")
            if name not in self._known or f"{path}.lora_A.weight" not in state:
                raise BadSetting(f"The adapter {folder.name} changes {name}, which is not served.", param="model")
            scaling = float(layer.scaling["default"])
            a, b = state[f"{path}.lora_A.weight"].float(), state[f"{path}.lora_B.weight"].float() * scaling
            magnitude = state.get(f"{path}.lora_magnitude_vector")
            if magnitude is None:
                found[name] = Change(a, b)
            else:
                gain = magnitude.float() / (self._weight_of(name).float() + b @ a).norm(dim=1)
                found[name] = Change(a, b * gain[:, None], gain)
        return found


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same architecture without weights."""
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(model.config)
    return made

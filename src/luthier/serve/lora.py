"""Adapters of one base: read, checked, kept while used, and applied to rows of a batch that mixes them.

An adapter is its content, never its name: the key that batches and caches see is a hash of its files. PEFT says which
modules it changes and how strongly (its own layers are built on a skeleton without memory), as in training.
Does not know: attention, sequences, where adapters come from.
"""

from __future__ import annotations

import copy
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
    """The changes of all active adapters to one fused layer, in float32; ranks that an adapter lacks are zeros."""

    a: Tensor  # [adapters, in, ranks]
    b: Tensor  # [adapters, ranks, out]
    gain: Tensor | None  # [1 + adapters, out]; row 0: the base


@dataclass
class Mix:
    """Adapters stacked for a batch. Each multiplies its own rows only, all of them in one batched product: on two
    cores, 16 rows and four adapters of rank 8, products of all rows with all ranks took four to six times as long.

    `set_rows` says for each step whose the rows are.
    """

    adapters: list[Adapter]
    pairs: list[Pair | None]
    who: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # [tokens], 0: the base
    _taken: Tensor | None = None  # [adapters x most rows]: which row stands there; where one has fewer, some other's
    _given: Tensor | None = None  # [rows with an adapter]: where their changes are
    _own: Tensor | None = None  # [rows with an adapter]; None: every row has one

    def set_rows(self, places: Sequence[int]) -> None:
        """`places[t]`: whose token t is, 0 for the base, else 1 + place."""
        self.who = torch.tensor(places, dtype=torch.long)
        groups: list[list[int]] = [[] for _ in self.adapters]
        for row, place in enumerate(places):
            if place:
                groups[place - 1].append(row)
        most = max(map(len, groups))
        self._own = None if 0 not in places else torch.tensor([row for row, place in enumerate(places) if place])
        if len(groups) == 1 and self._own is None:
            self._taken = self._given = None  # all rows as they lie
            return
        self._taken = torch.tensor([row for group in groups for row in group + [0] * (most - len(group))])
        there = {row: most * n + at for n, group in enumerate(groups) for at, row in enumerate(group)}
        self._given = torch.tensor([there[row] for row in sorted(there)])

    def add(self, index: int, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """`y`, the output [tokens, out] of layer `index` for `x`, changed for each row by its own adapter."""
        pair = self.pairs[index]
        if pair is None:
            return y
        if pair.gain is not None:
            gain = pair.gain[self.who]
            y = y * gain if bias is None else (y - bias) * gain + bias
        rows = x if self._taken is None else x.index_select(0, self._taken)
        if not len(rows):
            return y
        hidden = torch.bmm(rows.float().view(len(pair.a), -1, x.shape[1]), pair.a)
        change = torch.bmm(hidden, pair.b).view(-1, y.shape[1])
        if self._given is not None:
            change = change.index_select(0, self._given)
        return y.add_(change) if self._own is None else y.index_add_(0, self._own, change.to(y.dtype))


def stack(active: Sequence[Adapter], layout: Sequence[Sequence[Part]], dtype: torch.dtype) -> Mix:
    """The adapters `active` over linear layers whose outputs `layout` names; `dtype` is the base's."""
    return Mix(list(active), [_pair(active, parts, dtype) for parts in layout])


def pack(weight: Tensor) -> Tensor:
    """A bfloat16 weight [out, in] as oneDNN's kernels read it."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
    return packed


def _pair(active: Sequence[Adapter], parts: Sequence[Part], dtype: torch.dtype) -> Pair | None:
    changes = [
        [(part, adapter.changes[part.name]) for part in parts if part.name in adapter.changes] for adapter in active
    ]
    ranks = max(sum(len(change.a) for _, change in own) for own in changes)
    if not ranks:
        return None
    inner = next(change.a.shape[1] for own in changes for _, change in own)
    a = torch.zeros(len(active), inner, ranks, dtype=torch.float32)
    pair = Pair(a, torch.zeros(len(active), ranks, parts[-1].end, dtype=torch.float32), None)
    for place, own in enumerate(changes):
        at = 0
        for part, change in own:
            end = at + len(change.a)
            pair.a[place, :, at:end] = change.a.T
            pair.b[place, at:end, part.start : part.end] = change.b.T
            at = end
            if change.gain is not None:
                if pair.gain is None:
                    pair.gain = torch.ones(1 + len(active), parts[-1].end, dtype=dtype)
                pair.gain[1 + place, part.start : part.end] = change.gain
    return pair


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
        """`known`: names of the linear modules that a batch can change; `weight_of` gives the weight of one.

        To be made before anything computes: transformers sets torch's default dtype for all threads while it builds.
        """
        self._skeleton, self._weight_of, self._base_hash = skeleton(model), weight_of, base_hash
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
        made, state = adapters.fitted(copy.deepcopy(self._skeleton), folder)
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

"""The forgetting meter's engine: one model on the items of a probe, batched; scores that are known are not made again.

Choices and texts go through the training path (forests: what choices share is computed once), tasks through generate,
greedily, with the prompt that serving would use. Does not know: what the scores come to (proof/forgetting.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from luthier.data.render import Renderer, Unrenderable
from luthier.engine import generate, loss, step, stream
from luthier.engine.forest import Forest, Row, shared_prefix
from luthier.proof.probe import Item, digest
from luthier.settings import load_settings
from luthier.spec.data import Message
from luthier.spec.run import write_json

MICRO_TOKENS = 2048
ROOMS = (16, 32, 64)  # tokens that an answer may have, by what its task needs
SPARE = 8

Progress = Callable[[str, int, int], None]  # (what, done, total)


def measure(
    model: Any,
    renderer: Renderer,
    items: Sequence[Item],
    *,
    name: str = "model",
    micro_tokens: int = MICRO_TOKENS,
    batch_size: int = generate.BATCH_SIZE,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Scores by item id: 0 or 1, of a tie among n choices 1/n; of a text nats per token.

    Items that `model` cannot read whole, or whose turns its template refuses, have no score.
    """
    context = generate.context_of(model)
    scores = _read(model, renderer, [item for item in items if item.pairs], context, micro_tokens, name, progress)
    for room, tasks in tasks_of(renderer, items, context).items():
        done = generate.generate(
            model,
            [prompt for _, prompt in tasks],
            renderer.stop_ids,
            renderer.tokenizer.pad_id,
            generate.Sampling(max_tokens=room),
            context=context,
            batch_size=batch_size,
            progress=_bar(progress, f"Tasks of the probe ({room} tokens): {name}"),
        )
        for (item, _), answer in zip(tasks, done, strict=True):
            scores[item.id] = float(item.passes(renderer.answer(answer.ids)))
    return scores


def tasks_of(renderer: Renderer, items: Sequence[Item], context: int) -> dict[int, list[tuple[Item, list[int]]]]:
    """(task, ids of its prompt) by how many tokens an answer may have; those that cannot be asked are left out."""
    asked: dict[int, list[tuple[Item, list[int]]]] = {room: [] for room in ROOMS}
    for item in items:
        if item.pairs:
            continue
        with contextlib.suppress(Unrenderable):
            prompt, room = renderer.prompt([Message("user", item.prompt)]), _room(renderer, item)
            if len(prompt) + room <= context:
                asked[room].append((item, prompt))
    return asked


def _room(renderer: Renderer, item: Item) -> int:
    """How many tokens an answer may have, one of ROOMS: room for the right one and SPARE more. An answer that is cut
    there has gone wrong before; tasks without one right answer get the most."""
    if item.longest is None:
        return ROOMS[-1]
    need = len(renderer.tokenizer.plain(item.longest)) + SPARE
    return next((room for room in ROOMS if room >= need), ROOMS[-1])


def remembered(key: str, items: Sequence[Item], make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The scores of `items` by a model that `key` names by content; made and kept unless they are in the cache."""
    name = hashlib.sha256(f"{key}:{digest(items)}".encode()).hexdigest()
    path = load_settings().cache_dir / "probe" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(known, dict) and all(isinstance(score, float) for score in known.values()):
            return known
    scores = make()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next run its measuring
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, scores)
    return scores


def key_of(model_hash: str, renderer: Renderer, model: Any) -> str:
    """What scores depend on besides the items: the weights' content, their precision, and how prompts are written."""
    dtype = next(step.inner(model).parameters()).dtype
    words = [model_hash, str(dtype), renderer.template.source, list(renderer.stop_ids), ROOMS]
    return json.dumps(words)


# -- likelihoods -------------------------------------------------------------------------------------------------------


def _read(
    model: Any,
    renderer: Renderer,
    items: Sequence[Item],
    context: int,
    micro_tokens: int,
    name: str,
    progress: Progress | None,
) -> dict[str, float]:
    rows: list[Row] = []
    places: list[tuple[Item, slice]] = []
    for item in items:
        own = [row_of(renderer, *pair) for pair in item.pairs]
        if all(len(ids) <= context and weights.any() for ids, weights in own):
            places.append((item, slice(len(rows), len(rows) + len(own))))
            rows += own
    with step.forests(model):
        sums, right = _log_probs(model, rows, micro_tokens, _bar(progress, f"Choices of the probe: {name}"))
    found = {}
    for item, place in places:
        lengths = [len(continuation.encode()) for _, continuation in item.pairs]
        if item.form == "choice":
            found[item.id] = _chosen(sums[place] / lengths, item.gold)
        elif item.form == "exact":
            found[item.id] = float(right[place][0])
        else:
            found[item.id] = float(-sums[place][0] / rows[place.start][1].sum())
    return found


def row_of(renderer: Renderer, context: str, continuation: str) -> Row:
    """Ids of both, the tokens that differ from the context's own carrying weight 1 (never the row's first)."""
    tokenizer = renderer.tokenizer
    whole = np.asarray(tokenizer.with_first(tokenizer.plain(context + continuation)), np.int32)
    before = np.asarray(tokenizer.with_first(tokenizer.plain(context)) if context else [], np.int32)
    weights = np.ones(len(whole), np.float32)
    weights[: max(1, shared_prefix(before, whole))] = 0
    return whole, weights


def _chosen(scores: npt.NDArray[np.float64], gold: int) -> float:
    best = np.flatnonzero(scores == scores.max())
    return 1 / len(best) if gold in best else 0.0


def _log_probs(
    model: Any, rows: Sequence[Row], micro_tokens: int, progress: generate.Progress | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Of each row: the summed log-probability of its weighted tokens, nats; whether each of them is the likeliest."""
    sums, right = np.zeros(len(rows)), np.ones(len(rows), bool)
    inner = step.inner(model)
    head, vocabulary = loss.Head(inner), int(inner.config.get_text_config().vocab_size)

    def add(tree: Forest, hidden: Tensor) -> None:
        targets = torch.from_numpy(tree.targets).to(hidden.device)
        for cut in loss.slices(targets, vocabulary):
            logits = head(hidden[cut])
            picked = logits.log_softmax(-1).gather(1, targets[cut, None]).squeeze(1)
            np.add.at(sums, tree.sequences[cut], picked.double().cpu().numpy())
            hit = (logits.argmax(-1) == targets[cut]).cpu().numpy()
            np.logical_and.at(right, tree.sequences[cut], hit)

    stream.measure_rows(model, rows, micro_tokens, watch=add, progress=progress)
    return sums, right


def _bar(progress: Progress | None, what: str) -> generate.Progress | None:
    return (lambda done, total: progress(what, done, total)) if progress else None

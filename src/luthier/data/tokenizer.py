"""A model's tokenizer, twice: as it is, and a twin in which text can never become a control token.

In the twin every control token (special tokens: turn markers, BOS, EOS, ...) has a private stand-in, and its real
spelling is encoded as ordinary text. Whoever builds a row writes stand-ins for control tokens; whatever a user typed
stays text, whatever it spells. One call encodes a whole row, so tokenizers that treat the start of a text specially
(SentencePiece's leading space) see the row as it is.

One more stand-in, OPEN, marks where an answer begins. It splits the text, so no merge crosses the border between prompt
and answer, and it is read back as a position, so no character offsets are needed. (An answer ends with its end marker.)

Does not know: templates, messages, weights.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from luthier.spec.errors import BadSetting, NotFound

# Unguessable, so that no text in a file or a request can spell a stand-in. It never reaches an id or a file.
_NONCE = secrets.token_hex(6)


def _stand_in(name: str) -> str:
    return f"\ue000{_NONCE}{name}\ue001"


BREAK = _stand_in("break")  # put inside a control token's spelling in user text, so that templates carry it as text
OPEN = _stand_in("open")
# Older SentencePiece tokenizers put a space before every piece of text between control tokens. An answer is no such
# piece: it goes on after its prompt. So this character goes before it, takes the space, and both are taken out again.
_BAR = "\ue002"


class Tokenizer:
    """Loaded from a model folder: tokenizer.json, tokenizer_config.json, generation_config.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise NotFound(
                f"{folder} has no tokenizer.json.", param="model", hint="Pull the model again: `luthier models pull`."
            )
        self.base = Backend.from_file(str(file))
        self.base.no_padding()
        self.base.no_truncation()
        self.config = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        model_config = _read_json(folder / "config.json")
        self.bos = self._named("bos_token")
        self.eos = self._named("eos_token")
        self.declared_stops = _as_ids(generation.get("eos_token_id")) or _as_ids(model_config.get("eos_token_id"))
        self.pad_id = self._pad_id()
        self.context = int(model_config.get("max_position_embeddings") or 2048)
        self._make_twin()

    def _named(self, key: str) -> str | None:
        value = self.config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        return text if isinstance(text, str) and self.base.token_to_id(text) is not None else None

    def _pad_id(self) -> int:
        pad = self._named("pad_token") or self.eos
        found = self.base.token_to_id(pad) if pad else None
        return found if found is not None else 0

    def _make_twin(self) -> None:
        added = self.base.get_added_tokens_decoder()
        control = {token.content: token for token in added.values() if token.special}
        ids = {token.content: number for number, token in added.items()}
        named = [self.bos, self.eos, *(self.base.id_to_token(stop) for stop in self.declared_stops)]
        for text in named:
            if text and text not in control:
                control[text] = added.get(ids.get(text, -1), AddedToken(text, normalized=False))
        self.control_ids = {text: int(self.base.token_to_id(text) or 0) for text in control}

        twin = _text_only(self.base.to_str(), control)
        if any(self.control_ids[text] in twin.encode(text, add_special_tokens=False).ids for text in control):
            twin = _text_only(_without_spellings(self.base.to_str(), set(control)), control)
        stand_ins = {text: _stand_in(str(number)) for number, text in enumerate(control)}
        twin.add_tokens(
            [
                AddedToken(stand_ins[text], special=False, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip)
                for text, token in control.items()
            ]
            + [AddedToken(OPEN, special=False, normalized=False)]
        )
        self._twin = twin
        self.stand_ins = stand_ins
        self.open_id = twin.token_to_id(OPEN)
        self._real = {twin.token_to_id(mark): self.control_ids[text] for text, mark in stand_ins.items()}
        self.control = _spelling_pattern(control)
        self._borders = (*stand_ins.values(), *(text for text in ids if text not in control))
        self._greedy = tuple(stand_ins[text] for text, token in control.items() if token.rstrip)
        bar = self._twin_ids(_BAR + "a")
        spaced = self._twin_ids(OPEN + "a")[1:]
        self._bar = self._twin_ids(OPEN + _BAR)[1:] if bar[-len(spaced) :] != spaced else []

    @property
    def vocabulary_size(self) -> int:
        return int(self.base.get_vocab_size(with_added_tokens=True))

    def has(self, token: str) -> bool:
        return self.base.token_to_id(token) is not None

    @cached_property
    def first_ids(self) -> list[int]:
        """What this tokenizer itself puts before a text (usually BOS, often nothing)."""
        bare = self.base.encode("a", add_special_tokens=False).ids
        whole = self.base.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return list(whole[:start])
        return []

    def break_control(self, text: str) -> str:
        """`text` in which no control token can be recognised any more; undone by `protect`."""
        return self.control.sub(lambda found: self._broken(found[0]), text)

    def _broken(self, spelling: str) -> str:
        return spelling[0] + BREAK + spelling[1:] if spelling in self.stand_ins else spelling

    def protect(self, rendered: str) -> str:
        """Rendered text with stand-ins for the control tokens that the template wrote, and user text as it was."""
        marked = self.control.sub(lambda found: self.stand_ins.get(found[0], found[0]), rendered)
        return marked.replace(BREAK, "")

    def encode(self, marked: Sequence[str]) -> list[list[int]]:
        """Twin ids of texts made of plain text and stand-ins; `real` turns them into the model's own."""
        texts = [self._barred(text) for text in marked] if self._bar else list(marked)
        rows = [encoding.ids for encoding in self._twin.encode_batch_fast(texts, add_special_tokens=False)]
        return [self._unbarred(ids) for ids in rows] if self._bar else rows

    def _twin_ids(self, text: str) -> list[int]:
        return list(self._twin.encode(text, add_special_tokens=False).ids)

    def _barred(self, text: str) -> str:
        """`text` with a bar after each OPEN that goes on from text; behind a control token the space belongs there."""
        *before, last = text.split(OPEN)
        return "".join(part + OPEN + ("" if self._at_border(part) else _BAR) for part in before) + last

    def _at_border(self, before: str) -> bool:
        return not before or before.endswith(self._borders) or before.rstrip().endswith(self._greedy)

    def _unbarred(self, ids: list[int]) -> list[int]:
        kept: list[int] = []
        at = 0
        while at < len(ids):
            kept.append(ids[at])
            at += 1
            if kept[-1] == self.open_id and ids[at : at + len(self._bar)] == self._bar:
                at += len(self._bar)
        return kept

    def stand_in_id(self, control: str) -> int:
        return int(self._twin.token_to_id(self.stand_ins[control]) or 0)

    def real(self, twin_id: int) -> int:
        return self._real.get(twin_id, twin_id)

    def plain(self, text: str) -> list[int]:
        """Ids of ordinary text, whatever it spells, with nothing added."""
        return [self.real(twin) for twin in self._twin_ids(text)]

    def with_first(self, ids: list[int]) -> list[int]:
        """The tokenizer's own opening (BOS) before `ids`, unless they bring it already."""
        first = self.first_ids
        bos = self.control_ids.get(self.bos or "")
        if not first or ids[: len(first)] == first or (ids and bos is not None and ids[0] == bos):
            return ids
        return first + ids

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        ids = self.base.encode("a", add_special_tokens=False).ids
        return ids, self.base.decode(ids, skip_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids in the middle of a row: SentencePiece would eat the first space of ids decoded alone."""
        anchor, shown = self._anchor
        return self.base.decode(anchor + list(ids), skip_special_tokens=False)[len(shown) :]

    def stream(self) -> IncrementalText:
        return IncrementalText(self)

    @lru_cache(maxsize=65536)  # noqa: B019, one tokenizer lives as long as the process
    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes a token stands for, also when they are only part of a character."""
        piece = self.base.id_to_token(token_id) or ""
        if token_id in self.base.get_added_tokens_decoder():
            return piece.encode()
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        table = _byte_level_table()
        if self._byte_level and all(character in table for character in piece):
            return bytes(table[character] for character in piece)
        return piece.replace("▁", " ").encode()

    @cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.base.to_str()).get("decoder"))


class IncrementalText:
    """Token ids in, printable text out, as they come: holds back bytes that are not yet a whole character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        anchor, _ = tokenizer._anchor
        self._stream = DecodeStream(ids=list(anchor), skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        return self._stream.step(self._tokenizer.base, token_id) or ""


def _text_only(source: str, control: dict[str, AddedToken]) -> Backend:
    """The tokenizer of `source`, in which the spellings of control tokens are encoded as ordinary text."""
    twin = Backend.from_str(source)
    twin.no_padding()
    twin.no_truncation()
    twin.add_special_tokens([_as_special(token) for token in control.values()])
    twin.encode_special_tokens = True
    return twin


def _without_spellings(source: str, control: set[str]) -> str:
    """tokenizer.json whose model has no way to make a control token out of ordinary text: unigram models list control
    tokens among their pieces, and merges may lead to one."""
    value = json.loads(source)
    model = value["model"]
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [pair for pair in pairs if "".join(pair) not in control]
    elif isinstance(model.get("vocab"), list):
        gone = {text: _stand_in(f"gone{number}") for number, text in enumerate(sorted(control))}
        model["vocab"] = [[gone.get(piece, piece), score] for piece, score in model["vocab"]]
        for token in value["added_tokens"]:
            token["content"] = gone.get(token["content"], token["content"])
    return json.dumps(value, ensure_ascii=False)


def _as_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        special=True,
        normalized=token.normalized,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
    )


def _spelling_pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """One pattern for all control tokens. Numbered families (thousands of `<unused12>`) fold into one branch."""
    shapes = {re.sub(r"\d+", r"\\d+", re.escape(text)) for text in texts if text}
    return re.compile("|".join(sorted(shapes, key=len, reverse=True)) or r"(?!)")


def _as_ids(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadSetting(f"{path} is not JSON: {error}.", param="model") from error
    return value if isinstance(value, dict) else {}


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (Radford et al., 2019): printable ones are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}

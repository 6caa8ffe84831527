"""Where a file of JSON Lines can be cut, so that processes can read its parts by themselves.

Does not know: records (read.read_span reads those of a span), processes (scan.py).
"""

from __future__ import annotations

from pathlib import Path

from luthier.data.read import lines_start

_CHUNK = 1 << 18


def line_spans(path: Path, size: int) -> list[tuple[int, int]]:
    """Byte ranges of whole lines, of about `size` bytes each, that make up a file of JSON Lines; [] for other files.

    A line that is longer than `size` makes its span longer. Raises NotFound.
    """
    start = lines_start(path)
    if start is None:
        return []
    spans = []
    total = path.stat().st_size
    with open(path, "rb") as handle:
        while start < total:
            handle.seek(min(start + size, total) - 1)
            while (piece := handle.readline(_CHUNK)) and not piece.endswith(b"\n"):
                pass
            end = min(handle.tell(), total)
            spans.append((start, end))
            start = end
    return spans


def count_lines(path: Path, start: int, end: int) -> int:
    """Line breaks in bytes [start, end)."""
    count = 0
    with open(path, "rb") as handle:
        handle.seek(start)
        while start < end and (block := handle.read(min(_CHUNK, end - start))):
            count += block.count(b"\n")
            start += len(block)
    return count

"""`luthier forgetting`: what a tuned model lost of its general abilities, beside the model it came from.

Does not know: how anything is measured (engine/forget.py), what the number means (proof/forgetting.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.evaluate import load
from luthier.cli.output import console, print_json, visible, waiting
from luthier.spec.errors import NotFound
from luthier.spec.forgetting import Forgetting, PartChange
from luthier.spec.job import Precision

if TYPE_CHECKING:
    from luthier.cli.output import Progress
    from luthier.engine.models import Loaded
    from luthier.proof.probe import Item


def forgetting(
    model: Annotated[str, typer.Argument(help="A run folder or a tuned model.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="Compare with this model; default: the one it was tuned from.")
    ] = None,
    probe: Annotated[
        list[Path] | None,
        typer.Option("--probe", help="Items of your own in place of ours: a folder of suites, or one file."),
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", min=1, help="Ask about this many of the items, the same ones every time.")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="Chat template: a built-in name or a .jinja file.")
    ] = None,
    precision: Annotated[Precision, typer.Option("--precision", help="Weights and activations.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Measure what tuning cost in general ability: knowledge, arithmetic, instructions, formats, text.

    The number is the mean loss over kinds of items that the base could do, with a 95% interval. docs/forgetting.md
    says how it is made and which suites --probe reads. The base's scores are remembered by content.
    """
    from luthier.proof import probe as room

    items = [item for path in probe for item in room.suite(path)] if probe else room.general()
    items = room.sample(items, sample)
    loaded = load(model, precision)
    with waiting() as progress:
        found = _compare(loaded, base, items, template, precision, progress)
    if as_json:
        print_json({**found.model_dump(), "verdict": found.verdict})
        return
    show_forgetting(found)


def _compare(
    loaded: Loaded, base: str | None, items: list[Item], template: str | None, precision: Precision, bar: Progress
) -> Forgetting:
    from luthier.data.render import Renderer
    from luthier.engine import forget
    from luthier.engine.prove import untuned
    from luthier.proof.forgetting import compare

    renderer = Renderer.load(loaded.folder, template)
    other = load(base, precision) if base is not None else None
    reasons: list[str] = []
    before = untuned(loaded, other.model if other else None, reasons.append)
    if before is None:
        raise NotFound(" ".join(reasons), param="base", hint="Name the model to compare with: --base MODEL.")
    content = other.base_hash if other is not None and not other.adapter else before.hash
    with before.open() as model:

        def make() -> dict[str, float]:
            return forget.measure(model, renderer, items, name="before", progress=bar)

        # a base that is an adapter itself has no one content hash: it is measured anew
        old = forget.remembered(forget.key_of(content, renderer, model), items, make) if content else make()
    new = forget.measure(loaded.model, renderer, items, name="after", progress=bar)
    return compare(items, old, new, base or "the model it was tuned from")


# -- the table ---------------------------------------------------------------------------------------------------------


def show_forgetting(found: Forgetting) -> None:
    """The parts, then the sentence."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for title in ("items", "before", "after", "loss", "95% interval"):
        table.add_column(title, justify="right", overflow="fold")
    for part in found.parts:
        interval = f"{part.low:+.1%} to {part.high:+.1%}" if part.counted else "at chance: not counted"
        cells = (f"{part.items:,}", _share(part, part.before), _share(part, part.after), f"{part.loss:+.1%}", interval)
        table.add_row(visible(part.name), *cells, style=None if part.counted else "dim")
    out.print(table)
    lost = found.low is not None and found.low > 0
    out.print(Text(found.verdict, "red" if lost else ""), soft_wrap=not out.is_terminal)
    if found.left_out:
        out.print(
            f"{found.left_out:,} items were left out: longer than the model reads.", soft_wrap=not out.is_terminal
        )


def _share(part: PartChange, value: float) -> str:
    return f"{value:.1%}" if part.chance is not None else f"perplexity {value:.2f}"

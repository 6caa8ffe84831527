"""`luthier evaluate`: a tuned model beside its base on held-out rows, as a table with samples or as one JSON object.

Does not know: how anything is measured (engine/evaluate.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.output import console, print_json, short, typed, visible, waiting
from luthier.cli.proof import show_proof
from luthier.spec.data import Example, Preference, Problem
from luthier.spec.errors import BadData, BadSetting, NotFound
from luthier.spec.job import Precision
from luthier.spec.proof import CHOSEN_METRICS, EXAMPLES
from luthier.spec.report import Report, Sample, Score
from luthier.spec.run import TERMINAL, RunFolder

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.data.pairs import Meaning
    from luthier.engine.models import Loaded
    from luthier.proof.metrics import Metric

SHOWN_SAMPLES = 4
SHOWN_CHARACTERS = 300


def evaluate(
    model: Annotated[str, typer.Argument(help="A run folder, a tuned model, or any model name.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", help="Held-out rows, in any format that training reads.")],
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Measure the first rows only.")] = None,
    compare: Annotated[bool, typer.Option("--base/--no-base", help="Measure the base model too.")] = True,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest answer; default: the longest reference and more.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Answers written at a time.")] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="Chat template: a built-in name or a .jinja file.")
    ] = None,
    precision: Annotated[Precision, typer.Option("--precision", help="Weights and activations.")] = "auto",
    metric: Annotated[
        str, typer.Option("--metric", help=f"How answers are scored: auto, {', '.join(CHOSEN_METRICS)}.")
    ] = "auto",
    grader: Annotated[
        str | None,
        typer.Option("--grader", help="Your own score: module:function, of answer, wanted, prompt."),
    ] = None,
    grader_command: Annotated[
        str | None,
        typer.Option("--grader-command", help="Your own score: a command, JSON lines in, a score a line out."),
    ] = None,
    examples_from: Annotated[
        Path | None,
        typer.Option("--examples-from", help="Training rows: the base is also asked with some in its prompt."),
    ] = None,
    shown: Annotated[int, typer.Option("--examples", min=1, help="How many of them are shown.")] = EXAMPLES,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of bootstrap and permutations.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Measure a tuned model on held-out rows, base beside tuned: loss, and a metric that fits the answers.

    Loss is per learnt token, in nats. The metric follows from what the references look like (labels, JSON, tool calls,
    numbers, texts) or is named; the model's likeliest answer is taken. Each difference has a 95% interval and a paired
    test. Exit code 2 when a row cannot be measured.
    """
    examples = read(data, limit)
    known = _shown_rows(examples_from) if examples_from else []
    chosen = _metric(metric, grader, grader_command)
    loaded = load(model, precision)
    from luthier.data.render import Renderer
    from luthier.engine import evaluate as room
    from luthier.engine.generate import BATCH_SIZE
    from luthier.engine.prove import Plan, memory_folder

    notes: list[str] = []
    with waiting() as progress:
        report = room.evaluate(
            loaded,
            Renderer.load(loaded.folder, template),
            examples,
            compare=compare,
            plan=Plan(chosen, examples=shown, seed=seed, memory=memory_folder()),
            known=known,
            max_tokens=max_tokens,
            batch_size=batch_size or BATCH_SIZE,
            progress=progress,
            tell=notes.append,
            source=str(data),
        )
    for note in notes:
        console(stderr=True).print(visible(note), style="dim", markup=False, soft_wrap=True)
    if as_json:
        print_json(report.model_dump())
        return
    _show(report, room.matches, model)


def _metric(name: str, function: str | None, command: str | None) -> str | Metric:
    """The metric's name, or the user's own grader. Raises BadSetting."""
    if function is None and command is None:
        return name
    if name != "auto":
        raise BadSetting(f"--metric {name} and a grader: one of them scores.", param="metric", hint="Leave one out.")
    from luthier.proof.graders import grader

    return grader(function, command)


def read(path: Path, limit: int | None = None, param: str = "data") -> list[Meaning]:
    """The first `limit` examples of `path`. Raises NotFound, and BadData with every problem up to there."""
    from luthier.data.pairs import holds_pairs, read_meanings

    if not path.is_file():
        raise NotFound(f"No data file {path}.", param=param, hint=f"Check the path given with --{param}.")
    examples: list[Meaning] = []
    problems: list[Problem] = []
    for item in read_meanings(path, holds_pairs(path)):
        if not isinstance(item, Problem):
            examples.append(item)
            if len(examples) == limit:
                break
        elif item.severity == "error":
            problems.append(item)
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise BadData(f"{path} has {count}; the first: {problems[0]}", problems=problems)
    return examples


def _shown_rows(path: Path) -> list[Example]:
    """Rows to show in prompts. Raises as `read` does, and BadSetting for pairs of answers."""
    found = read(path, param="examples-from")
    rows = [row for row in found if not isinstance(row, Preference)]
    if len(rows) < len(found):
        raise BadSetting(
            f"--examples-from: {path} holds pairs of answers, wanted rows to imitate.", param="examples_from"
        )
    return rows


def load(name: str, precision: Precision) -> Loaded:
    """The model of a run, a folder or a name, with a bar while it is fetched. Raises NotFound for an unfinished run."""
    _refuse_unfinished(name)
    with waiting() as progress:
        progress(f"Loading {name}", 0, 0)
        from luthier.engine import models

        return models.load_for_use(name, models.default_precision() if precision == "auto" else precision, progress)


def _refuse_unfinished(name: str) -> None:
    """A run without a result: what became of it, and how it goes on."""
    run = RunFolder(Path(name).expanduser())
    if not run.request.is_file() or run.model.is_dir():
        return
    last = None
    for _, event in run.events():
        last = event
    ended = last is not None and last.get("type") in TERMINAL
    status = str(last["type"]) if ended and last else "not finished"
    reason = f" ({last['message']})" if last and last.get("type") == "failed" and last.get("message") else ""
    raise NotFound(
        f"The run {short(run.path)} has no model yet; it is {status}{reason}.",
        hint=f"Go on with it: {typed('luthier', 'train', '--resume', short(run.path))}",
        param="model",
    )


# -- the table ---------------------------------------------------------------------------------------------------------


def _show(report: Report, matches: Callable[[str | None, str], bool], model: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    scores = [(name, score) for name, score in (("base", report.base), ("tuned", report.tuned)) if score]
    if report.base is None:
        scores = [(visible(model), score) for _, score in scores]
    for name, _ in scores:
        table.add_column(name, justify="right", overflow="fold")
    for label, show in _LINES:
        cells = [show(score) for _, score in scores]
        if set(cells) != {"-"}:
            table.add_row(label, *cells)
    out.print(table)
    if report.proof is not None:
        show_proof(report.proof)
    wrong = [sample for sample in report.samples if not matches(sample.tuned, sample.wanted)]
    right = [sample for sample in report.samples if matches(sample.tuned, sample.wanted)]
    for sample in itertools.islice(itertools.chain(wrong, right), SHOWN_SAMPLES):
        _show_sample(out, sample, matches)
    if report.samples:
        out.print(f"{len(wrong)} of {len(report.samples)} answers differ from their reference.", soft_wrap=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


_LINES: tuple[tuple[str, Callable[[Score], str]], ...] = (
    ("held-out loss", lambda score: _number(score.loss)),
    ("token accuracy", lambda score: _share(score.token_accuracy)),
    ("exact match", lambda score: _share(score.exact_match)),
    ("pairs right", lambda score: _share(score.preference_accuracy)),
    ("rows", lambda score: f"{score.rows:,}"),
    ("learnt tokens", lambda score: f"{score.supervised_tokens:,}"),
)


def _show_sample(out: Console, sample: Sample, matches: Callable[[str | None, str], bool]) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("prompt", Text(_cut(sample.prompt)))
    grid.add_row("wanted", Text(_cut(sample.wanted)))
    for name, answer in (("base", sample.base), ("tuned", sample.tuned)):
        if answer is not None:
            grid.add_row(name, Text(_cut(answer), "green" if matches(answer, sample.wanted) else "red"))
    out.print(Padding(grid, (0, 0, 1, 0)))


def _cut(text: str) -> str:
    text = visible(text.strip())
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"

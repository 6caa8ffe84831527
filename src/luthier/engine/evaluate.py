"""Did it help: a tuned model beside its base on held-out examples. Loss, token accuracy, and the proof of its answers.

Loss and accuracy are sums over supervised tokens through the training path (stream.measure_rows), so no batch size can
change them. Answers are greedy, to the prompt that serving would use. Nothing but texts and sums is kept, so memory
does not grow with the number of rows.
Does not know: files, terminals, how a model was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from luthier.data.dataset import windows
from luthier.data.pairs import Meaning, render_all
from luthier.data.render import Renderer
from luthier.engine import generate, models, prove, step, stream
from luthier.engine.answers import Asker, Question
from luthier.engine.forest import Row
from luthier.proof.metrics import is_exact
from luthier.spec.data import Example, Preference, Problem, Text
from luthier.spec.errors import BadData
from luthier.spec.job import auto_max_length
from luthier.spec.proof import Proof, WayName
from luthier.spec.report import Report, Sample, Score

MICRO_TOKENS = 2048
SPARE_TOKENS = 16  # an answer may be this much longer than the longest reference before it is cut
MOST_TOKENS = 512

Progress = Callable[[str, int, int], None]  # (what, done, total)
Tell = Callable[[str], None]


@dataclass(slots=True)
class Material:
    """Held-out examples as the models need them. `texts` are the plain ones among them, `pairs` those of two answers,
    each with its rows."""

    examples: int = 0
    rows: list[Row] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    texts: list[tuple[Text, list[Row]]] = field(default_factory=list)
    pairs: list[tuple[Preference, list[Row]]] = field(default_factory=list)


def evaluate(
    loaded: models.Loaded,
    renderer: Renderer,
    examples: Sequence[Meaning],
    *,
    base: Any = None,
    compare: bool = True,
    plan: prove.Plan | None = None,
    known: Sequence[Example] = (),
    max_tokens: int | None = None,
    micro_tokens: int = MICRO_TOKENS,
    batch_size: int = generate.BATCH_SIZE,
    progress: Progress | None = None,
    tell: Tell | None = None,
    source: str = "",
) -> Report:
    """Measure `loaded`, and unless `compare` is False its base too, on `examples`.

    The base is `base` when given; for an adapter the same model with the adapter switched off; for a full model the
    one that its luthier.json names. When it cannot be had, `tell` hears why and the report's base is null. With
    training rows, `known`, the base answers a third time with the nearest of them in its prompt. `max_tokens` bounds an
    answer; by default the longest reference and SPARE_TOKENS more, at most MOST_TOKENS. `samples` has one entry for
    each example with an answer to ask for.

    Raises BadData with every example that the template or the model's context cannot hold; `source` names their file.
    """
    tell = tell or _ignore
    context = generate.context_of(loaded.model)
    material = prepare(renderer, examples, context, source)
    asked = [example for example in examples if not isinstance(example, Text | Preference)]
    if silent := len(asked) - len(material.questions):
        tell(f"{silent} rows have an empty prompt: their loss is measured, and there is no answer to ask for.")
    plan = plan or prove.Plan()
    untuned = prove.untuned(loaded, base, tell) if compare else None
    if material.pairs:
        return _of_pairs(prove.prove_pairs(loaded, material.pairs, plan, untuned), material)
    report = Report(tuned=score_rows(loaded.model, material, micro_tokens, progress, "tuned"))
    if untuned is not None:
        with untuned.open() as model:
            report.base = score_rows(model, material, micro_tokens, progress, "base")
    if material.questions:
        most = max_tokens or answer_tokens(renderer, material.questions, tell)
        asker = Asker(renderer, context, generate.Sampling(max_tokens=most), batch_size)
        report.proof = prove.prove(
            loaded, asker, material.questions, plan, base=untuned, known=known, progress=progress, tell=tell
        )
        report.samples = _samples(report)
        for name, score in (("base", report.base), ("tuned", report.tuned)):
            if score is not None:
                score.exact_match = _exact(report, name)  # type: ignore[arg-type]
    else:
        report.proof = prove.prove_texts(loaded, material.texts, plan, untuned)
    return report


def _of_pairs(proof: Proof, material: Material) -> Report:
    """Pairs are measured by which answer is found likelier; their loss depends on where training started."""
    learnt = sum(int(np.count_nonzero(weights >= 1)) for _, weights in material.rows)
    scores = {
        way.name: Score(
            rows=material.examples,
            preference_accuracy=None if way.passed is None else way.passed / len(proof.rows),
            supervised_tokens=learnt,
        )
        for way in proof.ways
    }
    return Report(base=scores.get("base"), tuned=scores["tuned"], proof=proof)


def score_rows(
    model: Any, material: Material, micro_tokens: int = MICRO_TOKENS, progress: Progress | None = None, name: str = ""
) -> Score:
    """Loss and token accuracy over all rows of `material`."""
    bar = (lambda done, total: progress(f"Loss of the {name} model", done, total)) if progress else None
    with step.forests(model):
        sums = stream.measure_rows(model, material.rows, micro_tokens, progress=bar)
    return Score(
        rows=material.examples,
        loss=sums.loss,
        token_accuracy=sums.token_accuracy,
        supervised_tokens=sum(int(np.count_nonzero(weights >= 1)) for _, weights in material.rows),
    )


def _exact(report: Report, name: WayName) -> float | None:
    rows = report.proof.rows if report.proof else []
    right = [matches(row.answers[name], row.wanted) for row in rows if name in row.answers]
    return sum(right) / len(right) if right else None


def _samples(report: Report) -> list[Sample]:
    rows = report.proof.rows if report.proof else []
    return [
        Sample(prompt=row.prompt, wanted=row.wanted, base=row.answers.get("base"), tuned=row.answers.get("tuned"))
        for row in rows
    ]


def matches(answer: str | None, wanted: str) -> bool:
    """Exact match: the same text, white space at both ends aside."""
    return answer is not None and is_exact(answer, wanted)


# -- what is measured --------------------------------------------------------------------------------------------------


def prepare(renderer: Renderer, examples: Sequence[Meaning], context: int, source: str) -> Material:
    """Rows to measure and questions to ask. Raises BadData with every example that cannot be measured."""
    material = Material()
    problems: list[Problem] = []
    for example, rendered in render_all(renderer, examples):
        if isinstance(rendered, Problem):
            problems.append(_in_file(rendered, source))
            continue
        if isinstance(example, Text):
            rendered = [window for row in rendered for window in windows(row, auto_max_length(context))]
        longest = max((len(row.ids) for row in rendered), default=0)
        if longest > context:
            found, wanted = f"a row of {longest} tokens", f"at most {context}, which is all that the model reads"
            problems.append(Problem(example.line, "", found, wanted, "Shorten it.", row=example.row, file=source))
            continue
        if isinstance(example, Preference) and len(rendered) != 2:
            found = f"answers that the chat template makes {len(rendered)} rows of"
            problems.append(Problem(example.line, "", found, "a row each", row=example.row, file=source))
            continue
        material.examples += 1
        rows = [(np.asarray(row.ids, np.int32), np.asarray(row.weights, np.float32)) for row in rendered]
        material.rows += rows
        if isinstance(example, Text):
            material.texts.append((example, rows))
        elif isinstance(example, Preference):
            material.pairs.append((example, rows))
        elif (asked := renderer.question(example)) is not None and asked[0]:
            material.questions.append(Question(example, *asked))
    if problems or not material.examples:
        first = f"{len(problems)} of the records cannot be measured; the first: {problems[0]}" if problems else ""
        raise BadData(first or "There is nothing to measure: no records.", problems=problems)
    return material


def _in_file(problem: Problem, source: str) -> Problem:
    return Problem(**{**problem.as_dict(), "file": problem.file or source})


def answer_tokens(renderer: Renderer, questions: Sequence[Question], tell: Tell) -> int:
    """Room for the longest reference and a little more."""
    lengths = [len(renderer.tokenizer.plain(question.wanted)) for question in questions]
    longest = max(lengths, default=0)
    most = min(MOST_TOKENS, longest + SPARE_TOKENS)
    if questions:
        tell(f"Answers may have {most} tokens; the longest reference has {longest}.")
    if cut := sum(length >= most for length in lengths):
        tell(f"{cut} references are longer, so their rows cannot match. Raise --max-tokens to count them.")
    return most


def _ignore(sentence: str) -> None:
    del sentence

"""Did it help? The tuned model beside its base on held-out examples: loss, token accuracy, exact match, samples.

Loss and accuracy are sums over supervised tokens through the training path (step.measure_rows), so no batch size can
change them. Exact match asks for a greedy answer with the prompt that serving would use. Nothing but texts and sums is
kept, so memory does not grow with the number of rows.
Does not know: files, terminals, how a model was trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.answer import answer_text
from luthier.data.dataset import windows
from luthier.data.render import Renderer
from luthier.engine import adapters, attention, catalogue, generate, install, models, step
from luthier.engine.forest import Row
from luthier.spec.data import Chat, Completion, Example, Problem, Text
from luthier.spec.errors import BadData, LuthierError
from luthier.spec.job import auto_max_length
from luthier.spec.report import Report, Sample, Score

MICRO_TOKENS = 2048
SPARE_TOKENS = 16  # an answer may be this much longer than the longest reference before it is cut
MOST_TOKENS = 512

Progress = Callable[[str, int, int], None]  # (what, done, total)
Tell = Callable[[str], None]


@dataclass(slots=True)
class _Question:
    """One answer to ask for. `example` tells how to read the ids that come back."""

    example: Chat | Completion
    prompt: list[int]
    wanted: str


@dataclass(slots=True)
class _Material:
    """Held-out examples as the models need them."""

    examples: int = 0
    rows: list[Row] = field(default_factory=list)
    questions: list[_Question] = field(default_factory=list)


def evaluate(
    loaded: models.Loaded,
    renderer: Renderer,
    examples: Sequence[Example],
    *,
    base: Any = None,
    compare: bool = True,
    max_tokens: int | None = None,
    micro_tokens: int = MICRO_TOKENS,
    batch_size: int = generate.BATCH_SIZE,
    progress: Progress | None = None,
    tell: Tell | None = None,
    source: str = "",
) -> Report:
    """Measure `loaded`, and unless `compare` is False its base too, on `examples`.

    The base is `base` when given; for an adapter the same model with the adapter switched off; for a full model the
    one that its luthier.json names, loaded after the tuned one was measured. When it cannot be had, `tell` hears why
    and the report's base is null. `max_tokens` bounds an answer; by default the longest reference and SPARE_TOKENS
    more, at most MOST_TOKENS. `samples` has one entry for each example with an answer to ask for.

    Raises BadData with every example that the template or the model's context cannot hold; `source` names their file.
    """
    tell = tell or _ignore
    context = generate.context_of(loaded.model)
    material = _prepare(renderer, examples, context, source)
    if silent := sum(not isinstance(example, Text) for example in examples) - len(material.questions):
        tell(f"{silent} rows have an empty prompt: their loss is measured, and there is no answer to ask for.")
    most = max_tokens or _answer_tokens(renderer, material.questions, tell)
    ask = _Ask(renderer, material, context, generate.Sampling(max_tokens=most), micro_tokens, batch_size, progress)

    tuned, answers = ask(loaded.model, "tuned")
    report = Report(tuned=tuned, samples=[_sample(question) for question in material.questions])
    for sample, answer in zip(report.samples, answers, strict=True):
        sample.tuned = answer
    with _base(loaded, base, compare, tell) as untuned:
        if untuned is not None:
            report.base, answers = ask(untuned, "base")
            for sample, answer in zip(report.samples, answers, strict=True):
                sample.base = answer
    return report


@dataclass(slots=True)
class _Ask:
    """Measures one model after another on the same material."""

    renderer: Renderer
    material: _Material
    context: int
    sampling: generate.Sampling
    micro_tokens: int
    batch_size: int
    progress: Progress | None

    def __call__(self, model: Any, name: str) -> tuple[Score, list[str]]:
        with _forests(model):
            sums = step.measure_rows(
                model, self.material.rows, self.micro_tokens, progress=self._bar(f"Loss of the {name} model")
            )
        answers = self._answers(model, self._bar(f"Answers of the {name} model"))
        pairs = list(zip(answers, self.material.questions, strict=True))
        right = sum(matches(answer, question.wanted) for answer, question in pairs)
        score = Score(
            rows=self.material.examples,
            loss=sums.loss,
            token_accuracy=sums.token_accuracy,
            exact_match=right / len(pairs) if pairs else None,
            supervised_tokens=sum(int(np.count_nonzero(weights >= 1)) for _, weights in self.material.rows),
        )
        return score, answers

    def _answers(self, model: Any, progress: generate.Progress | None) -> list[str]:
        questions = self.material.questions
        done = generate.generate(
            model,
            [question.prompt for question in questions],
            self.renderer.stop_ids,
            self.renderer.tokenizer.pad_id,
            self.sampling,
            context=self.context,
            batch_size=self.batch_size,
            progress=progress,
        )
        pairs = zip(done, questions, strict=True)
        return [answer_of(self.renderer, question.example, generation.ids) for generation, question in pairs]

    def _bar(self, what: str) -> generate.Progress | None:
        tell = self.progress
        return (lambda done, total: tell(what, done, total)) if tell else None


# -- what is measured --------------------------------------------------------------------------------------------------


def _prepare(renderer: Renderer, examples: Sequence[Example], context: int, source: str) -> _Material:
    material = _Material()
    problems: list[Problem] = []
    for example, rendered in renderer.try_render(examples):
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
        material.examples += 1
        material.rows += [(np.asarray(row.ids, np.int32), np.asarray(row.weights, np.float32)) for row in rendered]
        if not isinstance(example, Text) and (asked := renderer.question(example)) is not None and asked[0]:
            material.questions.append(_Question(example, *asked))
    if problems or not material.examples:
        first = f"{len(problems)} of the records cannot be measured; the first: {problems[0]}" if problems else ""
        raise BadData(first or "There is nothing to measure: no records.", problems=problems)
    return material


def _in_file(problem: Problem, source: str) -> Problem:
    return Problem(**{**problem.as_dict(), "file": problem.file or source})


def _answer_tokens(renderer: Renderer, questions: Sequence[_Question], tell: Tell) -> int:
    """Room for the longest reference and a little more."""
    lengths = [len(renderer.tokenizer.plain(question.wanted)) for question in questions]
    longest = max(lengths, default=0)
    most = min(MOST_TOKENS, longest + SPARE_TOKENS)
    if questions:
        tell(f"Answers may have {most} tokens; the longest reference has {longest}.")
    if cut := sum(length >= most for length in lengths):
        tell(f"{cut} references are longer, so their rows cannot match. Raise --max-tokens to count them.")
    return most


def answer_of(renderer: Renderer, example: Example, ids: Sequence[int]) -> str:
    """Generated ids as the text that is compared with `renderer.question`'s reference."""
    if isinstance(example, Chat):
        return answer_text(renderer.parse(ids))
    stops = set(renderer.stop_ids)
    end = next((n for n, token in enumerate(ids) if token in stops), len(ids))
    return renderer.tokenizer.decode(ids[:end])


def matches(answer: str | None, wanted: str) -> bool:
    """Exact match: the same text, white space at both ends aside."""
    return answer is not None and answer.strip() == wanted.strip()


def _sample(question: _Question) -> Sample:
    example = question.example
    if isinstance(example, Completion):
        return Sample(prompt=example.prompt, wanted=question.wanted)
    last = max(n for n, turn in enumerate(example.messages) if turn.role == "assistant" and turn.weight)
    before = example.messages[:last]
    asked = [turn.content for turn in before if turn.role == "user"] or [turn.content for turn in before]
    return Sample(prompt=asked[-1] if asked else "", wanted=question.wanted)


# -- the models --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _forests(model: Any) -> Iterator[None]:
    """While inside, `model` attends within forests; then as before."""
    inner = step.inner(model)
    before = inner.config._attn_implementation
    if before != attention.NAME:
        attention.install(inner)
    try:
        yield
    finally:
        if before != attention.NAME:
            inner.set_attn_implementation(before)


@contextlib.contextmanager
def _base(loaded: models.Loaded, base: Any, compare: bool, tell: Tell) -> Iterator[Any]:
    """The model to compare with, or None."""
    if not compare or base is not None:
        yield base if compare else None
    elif loaded.adapter:
        with loaded.model.disable_adapter():  # type: ignore[operator]
            yield loaded.model
    else:
        folder = _base_folder(loaded, tell)
        dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
        yield models.load_base(folder, "float32" if dtype == "float32" else "bfloat16") if folder else None


def _base_folder(loaded: models.Loaded, tell: Tell) -> Path | None:
    """The base of a full model; None, with the reason told, when it cannot be known or found."""
    try:
        wanted = adapters.base_of(loaded.folder)
    except LuthierError:
        tell(f"{loaded.name} does not say which base it was tuned from, so there is none to compare with.")
        return None
    where = Path(wanted.folder)
    try:
        found = where if install.is_model_folder(where) else catalogue.resolve(wanted.name, pull=False)
    except LuthierError:
        tell(f"The base {wanted.name} is not here any more ({where} is gone), so there is none to compare with.")
        return None
    if catalogue.content_hash(found) != wanted.hash:
        tell(f"{found} is no longer the base that {loaded.name} was tuned from, so there is none to compare with.")
        return None
    return found


def _ignore(sentence: str) -> None:
    del sentence

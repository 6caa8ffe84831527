"""Which metric fits: by what the reference answers look like, or as the user named it. It says why.

Does not know: models; a user's own grader (graders.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.data.strict_json import quote
from luthier.proof.calls import calls_of, tool_calls
from luthier.proof.classes import classification
from luthier.proof.fields import json_fields, value_of
from luthier.proof.metrics import Metric, exact_match
from luthier.proof.numeric import is_number, numeric
from luthier.proof.texts import PASS_MARK, text
from luthier.spec.errors import BadSetting
from luthier.spec.proof import CHOSEN_METRICS

MOST_LABELS = 50
ROWS_A_LABEL = 3  # on average, at least
LONGEST_LABEL = 60  # characters
SHORT = 40  # characters of an answer that is either the wanted one or wrong
TIE = 1e-6  # nats by which a preferred answer must be the likelier one
SHARE_OF_CALLS = 0.2  # of the references, from which on calls are what is learnt

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", "share of answers equal to their reference", exact_match),
        Metric("classification", "accuracy", classification),
        Metric("json", "F1 of JSON fields, mean over rows", json_fields),
        Metric("tool_calls", "share of answers with exactly the wanted calls", tool_calls),
        Metric("numeric", "share of answers with the right number", numeric),
        Metric("text", "chrF, mean over rows", text, pass_mark=PASS_MARK),
        # scored by the engine: nothing is answered
        Metric("perplexity", "loss per token, in nats", exact_match, pass_mark=None, higher_is_better=False),
        Metric("preference", "how much likelier the preferred answer is, in nats", exact_match, pass_mark=TIE),
    )
}


def choose(asked: str, wanted: Sequence[str], known: Sequence[str] = ()) -> tuple[Metric, str]:
    """(metric, why). `asked` is a name or "auto"; `wanted` are the references, `known` answers of training rows, which
    help to tell labels from short answers. Without any reference the rows are texts. Raises BadSetting for a metric
    that these references cannot have."""
    if asked != "auto":
        return _named(asked, wanted), "Named by the request."
    if not wanted:
        return METRICS["perplexity"], "The rows are plain texts."
    return _fitting(wanted, [*wanted, *known])


def _fitting(wanted: Sequence[str], every: Sequence[str]) -> tuple[Metric, str]:
    calling = sum(bool(calls_of(answer)) for answer in wanted)
    if calling >= SHARE_OF_CALLS * len(wanted):
        return METRICS["tool_calls"], f"{calling} of {len(wanted)} references call tools."
    if all(map(_is_json, every)):
        return METRICS["json"], "All references are JSON objects or lists."
    labels = {answer.strip() for answer in every}
    few = 2 <= len(labels) <= MOST_LABELS and len(every) >= ROWS_A_LABEL * len(labels)
    if few and all(label and len(label) <= LONGEST_LABEL and "\n" not in label for label in labels):
        return METRICS["classification"], f"The references are {len(labels)} distinct short answers."
    if all(map(is_number, wanted)):
        return METRICS["numeric"], "All references come to a number."
    if all(len(answer.strip()) <= SHORT and "\n" not in answer.strip() for answer in every):
        return METRICS["exact_match"], f"All references are short: at most {SHORT} characters."
    return METRICS["text"], "The references are texts of many kinds."


def _is_json(answer: str) -> bool:
    """An object or a list; the first character spares texts the parser."""
    return answer.lstrip()[:1] in ("{", "[", "`") and isinstance(value_of(answer), dict | list)


def _named(asked: str, wanted: Sequence[str]) -> Metric:
    if asked not in CHOSEN_METRICS:
        raise BadSetting(
            f"--metric: found {asked!r}; wanted auto, {', '.join(CHOSEN_METRICS)}.",
            param="metric",
            hint="Leave it out, and the metric follows from the reference answers.",
        )
    if (asked == "perplexity") == bool(wanted):
        found = "answers" if wanted else "plain texts"
        raise BadSetting(
            f"--metric {asked}: the held-out rows are {found}, wanted {'plain texts' if wanted else 'answers'}.",
            param="metric",
            hint="Their loss is measured in any case." if wanted else "Texts have perplexity alone.",
        )
    unfit = {"numeric": is_number, "json": _is_json}.get(asked)
    if unfit and (bad := next((answer for answer in wanted if not unfit(answer)), None)) is not None:
        what = "a number, alone or after ####" if asked == "numeric" else "a JSON object or list"
        raise BadSetting(
            f"--metric {asked}: found the reference {quote(bad)}; wanted {what}.",
            param="metric",
            hint="Name another metric, or leave --metric out.",
        )
    return METRICS[asked]

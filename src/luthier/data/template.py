"""Chat templates: the model's own Jinja, or one of ours, rendered in a sandbox with bounds on work and size.

A template is code that came with somebody's model. It runs in Jinja's immutable sandbox (no attribute of Python
reachable), and because the sandbox alone does not stop `'a' * 2_000_000_000` or three nested loops, loops are counted
and every operation that can grow a string is checked before it runs.

`strftime_now` does not tell today's date: a template that prints it would train other ids than it serves tomorrow. Most
templates guard for its absence with a date of their own, so it is undefined; for those that do not, it is NOW.

Does not know: tokens, roles, what a message may be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.spec.errors import BadSetting, UserError

MAX_TEXT = 32 * 1024 * 1024  # characters that one operation or one rendering may make
NOW = datetime(2026, 1, 1, tzinfo=UTC)
MAX_LOOPS = 2_000_000  # loop rounds in one rendering


class TemplateRefused(UserError):
    """The template would not render these messages: it raised, broke the sandbox, or outgrew its bounds."""

    code = "template_refused"


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` as other trainers write it; we find spans another way."""

    tags = {"generation"}  # noqa: RUF012, as jinja2 declares it

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Bounded(ImmutableSandboxedEnvironment):
    """The sandbox plus budgets. One instance renders one template at a time."""

    intercepted_binops = frozenset(["+", "*", "%", "**"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=_weighed,
        )
        self.loops = 0
        self.filters.update(tojson=_to_json, luthier_counted=self.counted, luthier_joined=self.joined)
        for name in ("center", "indent", "format"):
            self.filters[name] = self._measured(self.filters[name])
        for name in ("slice", "batch", "wordwrap", "pprint", "xmlattr", "urlize"):
            del self.filters[name]  # no chat needs them, and what they make has no bound
        self.filters.update(sum=_total, string=lambda value: str(_weighed(value)))
        self.filters["replace"] = self.replace
        self.globals.update(raise_exception=_raise)
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "luthier_counted", [], [], None, None)
        for joint in list(tree.find_all(nodes.Concat)):
            joint.nodes = [nodes.Filter(nodes.List(joint.nodes), "luthier_joined", [], [], None, None)]
        return tree

    def counted(self, items: Any) -> Any:
        """Count rounds before they run; keep the container (loop.length, reverse iteration need it)."""
        self._spend(len(items) if hasattr(items, "__len__") else 1_000)
        return items

    def _spend(self, rounds: int) -> None:
        self.loops += rounds
        if self.loops > MAX_LOOPS:
            raise SecurityError(f"more than {MAX_LOOPS:,} loop rounds and calls")

    def joined(self, parts: list[Any]) -> str:
        texts = [str(_weighed(part)) for part in parts]
        _check_size(sum(map(len, texts)))
        return "".join(texts)

    def replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        text = str(text)
        _check_size(len(text) + text.count(old) * len(new))
        result: str = text.replace(old, new, -1 if count is None else count)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and (isinstance(left, str | list | tuple) or isinstance(right, str | list | tuple)):
            sequence, times = (left, right) if hasattr(left, "__len__") else (right, left)
            _check_size(len(sequence) * max(0, int(times)))
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _check_size(len(left) + len(right))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() * max(0, right))
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("string formatting with % is not allowed")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        grows = {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate", "join"}
        if isinstance(obj, str) and attr in grows - {"join", "format"}:
            return False
        return bool(super().is_safe_attribute(obj, attr, value))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._spend(1)  # a macro that calls itself twice is a loop too
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "replace" and len(args) >= 2:
            _check_size(len(owner) + owner.count(args[0]) * len(args[1]))
        elif isinstance(owner, str) and name == "join" and args and hasattr(args[0], "__len__"):
            _check_size(sum(len(str(part)) + len(owner) for part in args[0]))
        elif isinstance(owner, str) and name == "format":
            raise SecurityError("str.format is not allowed")
        return super().call(__context, __obj, *args, **kwargs)

    @staticmethod
    def _measured(function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(text: Any, *args: Any, **kwargs: Any) -> Any:
            widest = max((value for value in (*args, *kwargs.values()) if isinstance(value, int)), default=0)
            _check_size((str(text).count("\n") + 1) * max(0, widest) + len(str(text)))
            return function(text, *args, **kwargs)

        return guarded


def _check_size(characters: int) -> None:
    if characters > MAX_TEXT:
        raise SecurityError(f"a text of {characters:,} characters (at most {MAX_TEXT:,})")


def _weighed(value: Any) -> Any:
    """`value`, whose parts have been counted: a list that holds itself twice, forty times over, prints for ever."""
    waiting, count = [value], 0
    while waiting:
        part = waiting.pop()
        count += 1
        if count > MAX_LOOPS:
            raise SecurityError(f"a value of more than {MAX_LOOPS:,} parts")
        if isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part
    return value


def _total(items: Any, attribute: str | None = None, start: float = 0) -> float:
    """Jinja's `sum`, of numbers only: summing lists copies them over and over."""
    numbers = [item[attribute] if attribute else item for item in items]
    if not all(isinstance(number, int | float) for number in [start, *numbers]):
        raise SecurityError("only numbers can be summed")
    return sum(numbers, start)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: unlike Jinja's own filter it neither sorts keys nor escapes quotes, so the model sees real JSON."""
    _weighed(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class ChatTemplate:
    """A compiled template. `variables` are the special tokens a template may name (bos_token, eos_token, ...)."""

    def __init__(self, source: str, name: str, variables: dict[str, str]) -> None:
        self.source = source
        self.name = name
        self.variables = variables
        self._environment = _Bounded()
        if not re.search(r"strftime_now\s+is\s+(not\s+)?defined", source):
            self._environment.globals["strftime_now"] = NOW.strftime
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BadSetting(
                f"Chat template {name}, line {error.lineno}: {error.message}.",
                param="template",
                hint="Give a valid Jinja file, or a built-in name: " + ", ".join(BUILT_IN) + ".",
            ) from error

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, generation: bool) -> str:
        """The conversation as text; with `generation`, up to where the assistant's next answer begins.

        Raises TemplateRefused with the template's own words when it will not render these messages.
        """
        self._environment.loops = 0
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=messages, tools=tools, add_generation_prompt=generation, **self.variables
            ):
                size += len(piece)
                _check_size(size)
                pieces.append(piece)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise TemplateRefused(f"template {self.name} refuses: {error}") from error
        except RecursionError as error:
            raise TemplateRefused(f"template {self.name} recurses without end") from error
        except MemoryError as error:
            raise TemplateRefused(f"template {self.name} takes all the memory there is") from error
        return "".join(pieces)


# Ours, for bases that bring none, or whose own cannot express the data (tools): data/templates/NAME.jinja.
BUILT_IN: dict[str, str] = {
    file.name.removesuffix(".jinja"): file.read_text(encoding="utf-8").rstrip("\n")
    for file in sorted(files("luthier.data").joinpath("templates").iterdir(), key=lambda file: file.name)
    if file.name.endswith(".jinja")
}


def own_template(value: Any, asked: str | None) -> str | None:
    """The template in tokenizer_config.json's `chat_template`: a text, or of a list of named ones the `default`.

    Line ends become plain, as Jinja has them anyway and files do not keep others. Raises BadSetting for a list without
    a default, unless another template is `asked` for.
    """
    if isinstance(value, list):
        named = {str(item.get("name")): item.get("template") for item in value if isinstance(item, dict)}
        if "default" not in named and asked is None:
            raise BadSetting(
                f"The model has {len(value)} chat templates ({', '.join(named)}) and none is the default.",
                param="template",
                hint="Write one of them to a file and give it with --template.",
            )
        value = named.get("default")
    return value.replace("\r\n", "\n") if isinstance(value, str) else None


def choose_template(asked: str | None, own: str | None, vocabulary: Callable[[str], bool]) -> tuple[str, str]:
    """(name, source): the one asked for (a built-in name or a file), else the model's own, else ours that fits.

    `vocabulary(token)` tells whether the tokenizer has that token. Raises BadSetting when `asked` names nothing, or a
    built-in whose turn markers the tokenizer does not have (they would become ordinary text that never stops).
    """
    if asked is None:
        if own:
            return "own", own
        fits = "gemma" if vocabulary("<start_of_turn>") else "chatml" if vocabulary("<|im_end|>") else "plain"
        return fits, BUILT_IN[fits]
    if asked in BUILT_IN:
        needs = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>"}.get(asked)
        if needs and not vocabulary(needs):
            raise BadSetting(
                f"--template {asked}: the tokenizer has no {needs} token, so turns would never end.",
                param="template",
                hint="Use --template plain, or a template made of this model's own tokens.",
            )
        return asked, BUILT_IN[asked]
    path = Path(asked)
    if not path.is_file():
        raise BadSetting(
            f"--template: found {asked!r}; wanted a built-in name ({', '.join(BUILT_IN)}) or a Jinja file.",
            param="template",
        )
    return path.name, path.read_text(encoding="utf-8")

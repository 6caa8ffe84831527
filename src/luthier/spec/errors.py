"""One tree of errors. Each says who erred, where, and the next step; doors translate it once (CLI text, HTTP JSON).

    LuthierError
    ├── UserError            the request or the data is wrong: correct it and ask again   (exit 2, HTTP 4xx)
    │   ├── BadData          records that cannot be trained on; carries every Problem
    │   ├── BadSetting       an option whose value cannot be used
    │   └── NotFound         a name, file or run that is not there
    ├── NotNow               right request, wrong moment: disk full, no source answers, in use   (exit 75)
    └── Broken               our own fault, or the machine's                              (exit 1)

To add one: subclass the branch that tells whose fault it is, and give it a `code`.
Does not know: how an error is shown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from luthier.spec.data import Problem


class LuthierError(Exception):
    """Base of everything raised on purpose.

    `message` is a whole sentence for the person who asked; `hint` is the next step; `param` names the option or
    field that was wrong, when there is one; `code` is a stable machine-readable word.
    """

    code = "error"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def as_dict(self) -> dict[str, str | None]:
        return {"code": self.code, "param": self.param, "message": self.message, "hint": self.hint}


class UserError(LuthierError):
    code = "invalid_request"
    exit_code = 2


class BadData(UserError):
    """A data file that cannot be trained on as asked. `problems` holds every finding, in file order."""

    code = "invalid_data"

    def __init__(
        self,
        message: str,
        *,
        problems: Sequence[Problem] = (),
        hint: str | None = None,
        param: str | None = "data",
    ) -> None:
        super().__init__(message, hint=hint, param=param)
        self.problems = list(problems)


class BadSetting(UserError):
    code = "invalid_setting"


class NotFound(UserError):
    code = "not_found"


class NotNow(LuthierError):
    code = "unavailable"
    exit_code = 75


class Broken(LuthierError):
    code = "internal"
    exit_code = 1

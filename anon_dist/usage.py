"""Command lines: tyro reads them, and what is wrong with one is said in one line."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import tyro
from tyro.conf import UseAppendAction

from anon_dist.columns import filled
from anon_dist.exits import USAGE, code_of

_OPTION = re.compile(r"--[a-zA-Z][\w.-]*")
_KINDS = {"INT": "a whole number", "FLOAT": "a number", "STR": "text", "PATH": "a path"}
"""What tyro calls a type, and a person."""


class UsageError(ValueError):
    """A command line that cannot be read, or names what is not there; the message names option, value and remedy."""

    exit_code = USAGE


class _Ended(SystemExit):
    """Of whose words a caller in Python gets to know."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


@contextlib.contextmanager
def ending(*kinds: type[Exception]) -> Iterator[None]:
    """A block of a command, that a `UsageError`, or an error of these kinds, ends: in one line, and with the exit code of its class."""
    expected: tuple[type[Exception], ...] = (UsageError, *kinds)
    try:
        yield
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        raise _Ended(f"error: {error}", code_of(error)) from None


def parse(kind: Any, args: Sequence[str], prog: str, **tyros: Any) -> Any:
    """What `tyro.cli` makes of a command line; what is wrong with one is a line, and exit code 2.

    Args:
        kind: the dataclass to fill.
        tyros: further arguments of `tyro.cli`.

    Raises:
        SystemExit: after that line, or after the help.
    """
    with ending():
        return parse_or_raise(kind, args, prog, **tyros)


def parse_or_raise(
    kind: Any,
    args: Sequence[str],
    prog: str,
    *,
    takes: Callable[[str], str | None] = lambda option: None,
    others: Sequence[str] = (),
    called: Mapping[str, Mapping[str, str]] | None = None,
    **tyros: Any,
) -> Any:
    """The same, for commands that report mistakes in their own way.

    Args:
        takes: what an option takes, in words, where there are better ones than tyro's; None: tyro's.
        others: options that are read elsewhere, to be suggested too.
        called: of an option, what its values are called elsewhere, and here.

    Raises:
        UsageError: an option is unknown (the nearest are named), comes twice, is missing, or its value is of another type.
        SystemExit: for `--help`, after it.
    """
    _check_once(args, _repeatable(kind))

    def refuse(event: Any) -> None:
        """Called by tyro in place of printing its own report."""
        if what := _what_is_wrong(event, args, takes, lambda: [*_options(kind, prog, **tyros), *others], called or {}):
            raise UsageError(f"{what} (--help lists all)")

    with _instead_of_a_report(refuse), _in_columns():
        return tyro.cli(kind, args=args, prog=prog, **tyros)


def values_of(args: Sequence[str], option: str) -> list[str]:
    """What stands behind an option, up to the next."""
    found: list[str] = []
    inside = False
    for arg in args:
        name, equals, value = arg.partition("=")
        if _OPTION.fullmatch(name):
            inside = _plain(name) == option
            found += [value] if inside and equals else []
        elif inside:
            found.append(arg)
    return found


def nearest(option: str, options: Sequence[str]) -> str:
    """ "; did you mean --optim.gamma?", or nothing where none is near."""
    names = {known.lstrip("-"): known for known in options}
    section, _, own_name = option.lstrip("-").rpartition(".")
    found = [name for name in names if name.rpartition(".")[2] == own_name]
    beside = {name.rpartition(".")[2]: name for name in names if section and name.rpartition(".")[0] == section}
    if not found and beside:
        found = [beside[key] for key in difflib.get_close_matches(own_name, beside, n=2)]
    found = found or difflib.get_close_matches(option.lstrip("-"), names, n=2)
    return f"; did you mean {' or '.join(names[name] for name in found[:3])}?" if found else ""


def nearest_value(value: object, words: str, called: Mapping[str, str] | None = None) -> str:
    """ "; did you mean columns?", or nothing where none is near.

    Args:
        words: what the value may be, "one of columns, rows, or None" say.
        called: what values are called elsewhere, and here.
    """
    text = str(value).lower()
    if found := (called or {}).get(text):
        return f"; did you mean {found}?"
    choices = words.rpartition("one of ")[2].split(", ") if "one of " in words else []
    choices = [choice for choice in choices if " " not in choice]
    begun = [choice for choice in choices if len(text) > 1 and choice.startswith(text)]
    near = begun or difflib.get_close_matches(text, choices, n=1)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def meant(near: Sequence[str]) -> str:
    """What a message on a wrong name ends with."""
    return f"; did you mean '{near[0]}'?" if near else " (anon-dist train --help lists all)"


def _repeatable(kind: Any) -> set[str]:
    """Options that may come several times."""
    hints = get_type_hints(kind, include_extras=True) if inspect.isclass(kind) else {}
    marked = (n for n, hint in hints.items() if UseAppendAction in getattr(hint, "__metadata__", ()))
    return {f"--{_plain(name)}" for name in marked}


def _check_once(args: Sequence[str], but: Collection[str]) -> None:
    """The last would hold, without a word."""
    seen: dict[str, str] = {}
    for name in (arg.partition("=")[0] for arg in args):
        if not _OPTION.fullmatch(name) or _plain(name) in but:
            continue
        switch = re.sub(r"(^--|\.)no-", r"\1", _plain(name))
        if switch in seen:
            raise UsageError(
                f"{name} comes twice; give it once"
                if seen[switch] == _plain(name)
                else f"{seen[switch]} and {name} contradict each other; give one"
            )
        seen[switch] = _plain(name)


def _plain(option: str) -> str:
    return option.replace("_", "-")


@contextlib.contextmanager
def _instead_of_a_report(refuse: Callable[[Any], None]) -> Iterator[None]:
    """tyro calls what its report would be about "internal, unstable": without that, the reports are its boxes."""
    try:
        from tyro._errors import on_parse_error
    except ImportError:
        yield
        return
    with on_parse_error(refuse):
        yield


class _Held(io.StringIO):
    """What is printed, with the colours and signs that its destination takes."""

    encoding = "utf-8"

    def __init__(self, destination: Any) -> None:
        super().__init__()
        self._destination = destination
        self.encoding = getattr(destination, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return bool(self._destination.isatty())


@contextlib.contextmanager
def _in_columns() -> Iterator[None]:
    """Break what tyro leaves as long as it is: how the command is called, and what it is for."""
    held = _Held(sys.stdout)
    try:
        with contextlib.redirect_stdout(held):
            yield
    finally:
        sys.stdout.write(filled(held.getvalue()))


def _options(kind: Any, prog: str, **tyros: Any) -> list[str]:
    """All that the help names."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=prog, **{**tyros, "return_unknown_args": False})
    return list(dict.fromkeys(_OPTION.findall(text.getvalue())))


def _what_is_wrong(
    event: Any,
    args: Sequence[str],
    takes: Callable[[str], str | None],
    options: Callable[[], list[str]],
    called: Mapping[str, Mapping[str, str]],
) -> str | None:
    """One of tyro's events in words; None: of a kind that is not known here."""
    kind = type(event).__name__
    if kind == "UnrecognizedArgs":
        return _unknown(event.tokens, args, takes, options)
    if kind == "MissingArgs":
        names = [_name(missing.arg) for missing in event.missing_arguments]
        helps = [_first_sentence(missing.arg) for missing in event.missing_arguments]
        each = "; ".join(f"{name}: {text}" for name, text in zip(names, helps, strict=True))
        unknown = f"{_unknown(event.unrecognized_tokens, args, takes, options)}; " if event.unrecognized_tokens else ""
        return f"{unknown}{', '.join(names)} {f'are missing ({each})' if len(names) > 1 else f'is missing: {helps[0]}'}"
    if kind in ("BadValue", "InvalidChoice", "InstantiationFailure") and event.argument is not None:
        name = _name(event.argument)
        choices = getattr(event, "choices", None)
        metavar = f"{event.argument.lowered.metavar}"
        words = "one of " + ", ".join(choices) if choices else _KINDS.get(metavar.removeprefix("{None}|"), metavar)
        given = values_of(args, name)
        if event.argument.is_positional():
            name = event.argument.field.intern_name.upper() if choices else name  # else these stand for it
            given = [str(said)] if (said := getattr(event, "value", getattr(event, "offending_value", None))) else []
        return _wrong_value(name, takes(name) or words, given, called.get(name))
    return None


def _name(argument: Any) -> str:
    return str(argument.lowered.metavar if argument.is_positional() else argument.lowered.name_or_flags[-1])


def _first_sentence(argument: Any) -> str:
    """Of an option's help."""
    given = argument.field.helptext
    text = str((given() if callable(given) else given) or argument.lowered.metavar)
    return re.split(r"\.(?:\s|$)", " ".join(text.split()))[0]


def _wrong_value(option: str, words: str, values: Sequence[str], called: Mapping[str, str] | None = None) -> str:
    if not values:
        return f"{option} needs a value: {words}"
    near = nearest_value(values[0], words, called) if len(values) == 1 else ""
    return f"{option} must be {words}, not {' '.join(map(repr, values))}{near}"


def _unknown(
    tokens: Sequence[str], args: Sequence[str], takes: Callable[[str], str | None], options: Callable[[], list[str]]
) -> str:
    """The first token that tyro does not know, and what was meant."""
    token = tokens[0].partition("=")[0]
    if _OPTION.fullmatch(token):
        return f"{token} is no option{nearest(_plain(token), options())}"
    place = next((i for i, arg in enumerate(args) if arg == tokens[0] or arg.endswith(f"={tokens[0]}")), len(args))
    before = [_plain(arg.partition("=")[0]) for arg in args[: place + 1] if _OPTION.match(arg)]
    if before and (words := takes(before[-1])):
        return _wrong_value(before[-1], words, values_of(args, before[-1]))
    return f"{tokens[0]!r} belongs to no option{f': {before[-1]} takes no more' if before else ''}"

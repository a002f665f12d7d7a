"""The training configuration (`fields`), read from YAML, overridden on the command line, and checked.

launch/pretrain.py --config configs/train/quickstart.yaml --optim.gamma 0.5 --train.steps 1000
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
import yaml

from anon_dist.arguments import parse, whole_number
from anon_dist.train.config import strict_yaml, yaml_flags
from anon_dist.train.config.errors import ConfigError
from anon_dist.train.config.fields import (
    CALLED,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PhaseConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
)
from anon_dist.train.config.idle import refuse_idle
from anon_dist.train.config.phases import resolved
from anon_dist.train.config.ranges import Instead, spell
from anon_dist.train.config.rules import model_rules, optim_rules, phase_rules, train_rules
from anon_dist.usage import UsageError, meant, nearest_value, parse_or_raise, values_of

if TYPE_CHECKING:
    from pydantic import TypeAdapter

yaml_flags.register()

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "PhaseConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TrainConfig",
    "accumulation",
    "check",
    "field_types",
    "find_config",
    "flat",
    "load_config",
    "options_class",
    "parse_args",
    "shipped_configs",
    "shipped_names",
    "to_yaml",
    "with_fields",
]


def check(config: Config) -> None:
    """Every field's type and range, and the relations between fields that no single type can say.

    Raises:
        ConfigError: naming the fields, what they may be, and what they are.
    """
    _validated(dataclasses.asdict(config), str)
    for rules in (model_rules, optim_rules, train_rules, phase_rules):
        rules(config)


def accumulation(config: Config, world_size: int) -> int:
    """Micro-batches per step and rank.

    Raises:
        ConfigError: the global batch does not divide evenly.
    """
    per_round = config.train.micro_batch * world_size
    if config.train.global_batch % per_round:
        raise ConfigError(
            f"train.global_batch = {config.train.global_batch} is not a multiple of train.micro_batch · ranks = "
            f"{config.train.micro_batch} · {world_size}; change one of them"
        )
    return config.train.global_batch // per_round


# -- reading ----------------------------------------------------------------------------------------------------------


def find_config(name: str) -> Path:
    """The file of that path, or else the shipped training configuration of that name (`quickstart`).

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = shipped_configs() / "train"
    shipped = folder / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file() and shipped.parent == folder:
        return shipped
    if path.is_dir():
        raise ConfigError(f"--config {name} is a folder; name a YAML file, {path / 'config.yaml'} say")
    names = shipped_names()
    meant = difflib.get_close_matches(name, names, n=1)
    raise ConfigError(
        f"--config {name}: no such file, and no shipped configuration of that name ({', '.join(names)})"
        + (f"; did you mean {meant[0]}?" if meant else "")
    )


def shipped_names() -> list[str]:
    """Of the shipped training configurations."""
    return sorted(p.stem for p in (shipped_configs() / "train").glob("*.yaml"))


def shipped_configs() -> Path:
    """The folder `configs`: of the clone, or inside the installed package."""
    package = Path(__file__).resolve().parents[2]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load_config(path: Path) -> Config:
    """The configuration in a YAML file; what it does not say is the default.

    Raises:
        ConfigError: the file is no YAML mapping, a key is unknown (the nearest is suggested) or comes twice, or a value has the wrong type
            or is out of its range.
    """
    try:
        values = strict_yaml.load(path.read_text())
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigError(f"{path}{line}: {', '.join(filter(None, (error.context, error.problem)))}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no configuration: it is not text in UTF-8 ({error.reason})") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if values is None:
        raise ConfigError(f"{path} says nothing; write what is to be other than by default, or leave --config out")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(values).__name__}")
    return _validated(values, lambda name: f"{path}: '{name}'")


def parse_args(
    args: Sequence[str] | None = None, prog: str = "anon-dist train", *, others: Sequence[str] = ()
) -> Config:
    """The configuration of a command line: `--config FILE` first, then `--section.field value` over it.

    Args:
        prog: what help and messages call the command.
        others: options that the command has besides, to be suggested too.

    Raises:
        ConfigError: as `load_config` and `check` do; for flags that are unknown, come twice, or have no value of their type.
        SystemExit: for `--help`, or for no arguments at all, after it.
    """
    file, rest = _file_of(list(sys.argv[1:] if args is None else args))
    if file is None and rest and rest[0] in shipped_names():
        raise ConfigError(f"{rest[0]} belongs to no option; did you mean --config {rest[0]}?")
    rest = _as_now(rest)
    default = Config() if file is None else load_config(file)
    shown = options_class()(**{f.name: getattr(default, f.name) for f in dataclasses.fields(default)})
    flags = (tyro.conf.FlagConversionOff,)  # every flag takes a value, as in the file
    also = {f"--{name.replace('_', '-')}": names for name, names in CALLED.items()}
    read = partial(parse_or_raise, takes=_takes, others=others, called=also)
    try:
        parsed = parse(type(shown), rest, prog, runs_bare=file is not None, default=shown, config=flags, read=read)
    except UsageError as error:
        raise ConfigError(str(error)) from None
    config = Config(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(Config)})
    _check_keys(rest)
    config = _validated(dataclasses.asdict(config), lambda name: "--" + name.replace("_", "-"))
    refuse_idle(config, rest)
    try:
        config = resolved(config)
        check(config)
    except ConfigError as error:
        source = f"{file} and the command line: " if config != default else f"{file}: "
        raise ConfigError(f"{source if file else ''}{error}") from None
    return config


def _takes(flag: str) -> str | None:
    """What a flag's value may be, in words."""
    hint = field_types().get(flag.removeprefix("--").replace("-", "_"))
    return None if hint is None else spell(hint)


def _check_keys(args: Sequence[str]) -> None:
    """Of mappings on the command line, of which the last value of a key would hold."""
    for name, hint in field_types().items():
        if typing.get_origin(hint) is dict:
            flag, key_type = "--" + name.replace("_", "-"), typing.get_args(hint)[0]
            read = whole_number if typing.get_args(key_type)[0] is int else str
            given = [read(key) for key in values_of(args, flag)[::2]]
            if twice := [key for i, key in enumerate(given) if key in given[:i]]:
                raise ConfigError(f"{flag} names {twice[0]!r} twice: {' '.join(values_of(args, flag))}")


def options_class() -> type[Config]:
    """The configuration with a field `config`, which the help then shows among the options."""
    text = f"Configuration: a YAML file, or the name of a shipped one ({', '.join(shipped_names())}). All other options are set over it."
    hint = Annotated[str, tyro.conf.arg(help=text, metavar="FILE", help_behavior_hint="(optional)")]
    made = dataclasses.make_dataclass("Options", [("config", hint, "")], bases=(Config,))
    made.__doc__ = "Pretrain a GPT-style model, or go on with it."
    return made


def _file_of(args: list[str]) -> tuple[Path | None, list[str]]:
    """The file that --config names, and the other arguments."""
    names, rest, i = [], [], 0
    while i < len(args):
        if args[i] == "--config":
            if i + 1 == len(args):
                raise ConfigError("--config names nothing: give a file, or a shipped configuration's name")
            names.append(args[i + 1])
            i += 1
        elif args[i].startswith("--config="):
            names.append(args[i].split("=", 1)[1])
        else:
            rest.append({"true": "True", "false": "False"}.get(args[i], args[i]))  # as YAML spells them
        i += 1
    if len(names) > 1:
        raise ConfigError(f"--config comes {len(names)} times: {', '.join(names)}; give one")
    return (find_config(names[0]) if names else None), rest


def _as_now(args: list[str]) -> list[str]:
    """Arguments with what stands now for values of former versions."""
    found = list(args)
    for name, hint in field_types().items():
        flag = f"--{name.replace('_', '-')}"
        for instead in (m for m in typing.get_args(hint)[1:] if isinstance(m, Instead)):
            for i, arg in enumerate(found):
                if arg == flag and i + 1 < len(found):
                    found[i + 1] = instead.of_text(found[i + 1])
                elif arg.startswith(f"{flag}="):
                    found[i] = f"{flag}={instead.of_text(arg.split('=', 1)[1])}"
    return found


@cache
def field_types(section: type = Config, prefix: str = "") -> Mapping[str, Any]:
    """Dotted name → annotated type, of every field."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(section, include_extras=True)
    for key in (field.name for field in dataclasses.fields(section)):
        name, hint = f"{prefix}{key}", hints[key]
        found.update(
            field_types(typing.cast(type, hint), f"{name}.") if dataclasses.is_dataclass(hint) else {name: hint}
        )
    return found


def with_fields(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """A copy in which the fields of these dotted names have these values, converted as in a file.

    Args:
        where: what the values come from, for the message.

    Raises:
        ConfigError: a name is unknown (the nearest is suggested), or a value has the wrong type or is out of its range.
    """
    changed = dataclasses.asdict(config)
    for name, value in values.items():
        if name not in field_types():
            raise ConfigError(f"{where}: unknown field '{name}'{_meant(name)}")
        *sections, key = name.split(".")
        owner = changed
        for section in sections:
            owner = owner[section]
        owner[key] = value
    return _validated(changed, lambda name: f"{where}: '{name}'")


def to_yaml(config: Config) -> str:
    """The configuration as `load_config` reads it."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name → value, of every field of a configuration as a nested mapping."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, Mapping) and name not in field_types()
        found.update(flat(value, f"{name}.") if nested else {name: value})
    return found


@cache
def _checker() -> TypeAdapter[Config]:
    from pydantic import TypeAdapter

    return TypeAdapter(Config)


def _validated(values: Mapping[str, Any], called: Callable[[str], str]) -> Config:
    """The configuration in a nested mapping.

    Args:
        called: what a message calls the field of a dotted name.

    Raises:
        ConfigError: naming every field that is unknown, of the wrong type, or out of its range.
    """
    from pydantic import ValidationError

    try:
        # As JSON, in which lists are tuples, and "5" is the step 5 of a schedule.
        config = _checker().validate_json(json.dumps(values, default=str))
        _check_mappings(values, config, called)
        return config
    except ConfigError:
        raise
    except ValidationError as error:
        found = error.errors(include_url=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{called('the configuration')}: {error}") from None
    messages = dict.fromkeys(_message(error["loc"], error["type"], error["msg"], values, called) for error in found)
    raise ConfigError("; ".join(messages))


def _check_mappings(values: Mapping[str, Any], config: Config, called: Callable[[str], str]) -> None:
    """Of keys that are spelt differently and mean the same step, 0 and '0', say, the last would hold."""
    for name, hint in field_types().items():
        if typing.get_origin(hint) is dict:
            given: Any = values
            got: Any = config
            for key in name.split("."):
                given, got = given.get(key, {}), getattr(got, key)
            if len(got) < len(given):
                raise ConfigError(f"{called(name)} names one of its keys twice: {given!r:.200}")


def _message(
    loc: tuple[Any, ...], kind: str, text: str, values: Mapping[str, Any], called: Callable[[str], str]
) -> str:
    """What is wrong with one field. pydantic says where it is, and more of the place than the field's name; its type says the rest."""
    whole, name, value = ".".join(map(str, loc)), "", values
    if kind == "unexpected_keyword_argument" and len(loc) > 2:
        inner = _inner(field_types()[".".join(loc[:2])], None)
        close = difflib.get_close_matches(str(loc[-1]), [f.name for f in dataclasses.fields(inner)], n=1)
        place, found, _ = called(whole).partition(repr(whole))
        return f"{place if found else ''}unknown key '{whole}'{meant(close)}"
    if kind == "unexpected_keyword_argument":
        return f"{called(whole).removesuffix(repr(whole))}unknown key '{whole}'{_meant(whole)}"
    if not loc:
        return f"{called('the configuration')}: {text}"
    hint: Any = None
    for key in loc[:2] if loc[-1] == "[key]" else loc:
        name = f"{name}.{key}".lstrip(".")
        if kind == "missing" and (not isinstance(value, Mapping) or key not in value):
            return f"{called(name)} is missing; it must be {spell(_inner(hint, key))}"
        value = value[next(k for k in value if str(k) == str(key)) if isinstance(value, Mapping) else key]
        hint = field_types().get(name) if hint is None else _inner(hint, key)
        if hint is not None and not any(map(dataclasses.is_dataclass, (hint, *typing.get_args(hint)))):
            break  # pydantic says more of the place
    given = repr(value) if len(repr(value)) < 120 else f"{value!r:.110}…"
    if hint is None:
        return f"{called(name)} is a section, not {given}"
    if kind == "value_error":
        return f"{called(name)} {text.removeprefix('Value error, ')}"
    return f"{called(name)} must be {spell(hint)}, not {given}{nearest_value(value, spell(hint), CALLED.get(name))}"


def _inner(hint: Any, key: Any) -> Any:
    """The type of what has this key in a value of type `hint`: a section, or a mapping or list of sections."""
    if dataclasses.is_dataclass(hint):
        return typing.get_type_hints(hint, include_extras=True)[key]
    return next(filter(dataclasses.is_dataclass, typing.get_args(hint)))


def _meant(name: str) -> str:
    """The field, or the section, that was meant by a wrong name, if one is near."""
    section, _, key = name.rpartition(".")
    names = [*field_types(), *{n.partition(".")[0] for n in field_types()}]
    same = [n for n in names if n.rpartition(".")[2] == key]
    beside = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[0] == section}
    return meant(same or [beside[k] for k in difflib.get_close_matches(key, beside, n=1)])

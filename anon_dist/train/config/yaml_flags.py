"""Mappings of sections, such as data.sources, on the command line: as YAML."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import yaml
from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from anon_dist.arguments import REGISTRY
from anon_dist.train.config import strict_yaml


def register() -> None:
    """Have options read so whose type is a mapping or a list of dataclasses. To be called once."""
    REGISTRY.primitive_rule(_as_yaml)


def _as_yaml(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kind = typing.get_origin(info.type)
    if kind not in (dict, tuple) or not any(map(dataclasses.is_dataclass, typing.get_args(info.type))):
        return None

    def read(words: list[str]) -> Any:
        try:
            return strict_yaml.load(words[0])
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="YAML",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [_flow(value)],
    )


def _flow(value: Any) -> str:
    """Sections on one line."""
    named = isinstance(value, dict)
    plain = {k: dataclasses.asdict(v) for k, v in value.items()} if named else [dataclasses.asdict(v) for v in value]
    return str(yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=1 << 20)).strip()

"""YAML as people mean it: a key that comes twice is an error, 6e-4 is a number, off and 2026-01-01 are text (YAML 1.2)."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - as PyYAML has it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As PyYAML does it, once no key comes twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = None
            if isinstance(key_node, yaml.ScalarNode):  # by value: 1000 and 1_000 and 1e3 are one
                merge = key_node.tag.endswith(":merge")
                key = (key_node.tag if merge else self.construct_object(key_node),)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key_node.value}' comes twice", key_node.start_mark
                )
            seen |= {key} - {None}
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|None|", "~nN"),
    ("int", "[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, *([""] if _tag == "null" else [])]
    )


def load(text: str) -> Any:
    """The one document in `text`, as plain Python values.

    Raises:
        yaml.YAMLError: it is no YAML, or a key comes twice.
    """
    return yaml.load(text, _Loader)

"""Whether there are lm-eval tasks of some names, by the text of its files: a second, where its own index of them takes half a minute.

A name that is in no file is none of a task. One that is may still be none, which lm-eval says once its index is made.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

INSTALL = "pip install 'lm-eval>=0.4.13'"
_NAMED = re.compile(rb"""^[\s-]*["']?(?:task|group|tag)["']?:\s*["']?([\w.:/-]+)""", re.MULTILINE)


def tasks_problem(names: Sequence[str], include_path: str | None) -> str | None:
    """What is wrong with some names of tasks, and the remedy; None: nothing that the files' text tells.

    Args:
        names: of tasks, groups, tags, or YAML files.
        include_path: a folder of task files besides lm-eval's.
    """
    package = find_spec("lm_eval")
    if package is None or package.origin is None:
        return not_installed("lm_eval")
    if include_path is not None and not os.path.isdir(include_path):
        return f"the folder of task files {include_path} does not exist"
    left = {name: re.compile(rb"(?<![\w.-])" + re.escape(name.encode()) + rb"(?![\w.-])") for name in names}
    left = {name: pattern for name, pattern in left.items() if not os.path.isfile(name)}
    known: set[str] = set()
    for folder in filter(None, (include_path, str(Path(package.origin).parent / "tasks"))):
        for text in _texts(folder):
            left = {name: pattern for name, pattern in left.items() if not pattern.search(text)}
            if not left:
                return None
            known.update(name.decode() for name in _NAMED.findall(text))
    return no_task(next(iter(left)), sorted(known))


def not_installed(package: str) -> str:
    """What to say where a package is missing that lm-eval is, or needs."""
    return f"tasks are run by lm-eval, and {package} is not installed: {INSTALL}"


def no_task(name: str, known: Sequence[str]) -> str:
    """What to say of a name that is none of a task."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no task {name}{f'; did you mean {near[0]}?' if near else ''} (a YAML file can be named too)"


def _texts(folder: str) -> Iterator[bytes]:
    for place, _, files in os.walk(folder):
        for file in files:
            if file.endswith((".yaml", ".yml")):
                with open(os.path.join(place, file), "rb") as opened:
                    yield opened.read()

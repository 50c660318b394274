"""YAML text, parents, `--set a.b=c` and ${VARIABLES} to one plain dict; and pydantic's complaints to sentences a user can act on."""

import copy
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from subquad.errors import UserError
from subquad.registry import nearest

_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4) and refuses a key written twice (YAML keeps the last, silently)."""

    def construct_mapping(self, node, deep=False):
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, list | dict):
                raise yaml.constructor.ConstructorError(None, None, "a list or mapping cannot be a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is written twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises UserError that names `where`, the line and the column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{place}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises UserError when it is missing, unreadable, or something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a mapping (key: value lines), got {type(data).__name__}.")
    return data


def merge(parent: Any, child: Any) -> Any:
    """`child` over `parent`: mappings are merged key by key, everything else (lists too) is replaced."""
    if not (isinstance(parent, dict) and isinstance(child, dict)):
        return copy.deepcopy(child)
    return {key: merge(parent.get(key), child[key]) if key in child else copy.deepcopy(parent[key]) for key in [*parent, *child]}


def apply_sets(data: dict[str, Any], sets: list[str]) -> dict[str, Any]:
    """`data` with every 'a.b.0.c=value' of `sets` written into it; values are YAML. Raises one UserError for all bad ones."""
    data, problems = copy.deepcopy(data), []
    for text in sets:
        path, equals, value = text.partition("=")
        if not equals or not path.strip():
            problems.append(f"--set {text}: expected key=value, for example --set data.train=novel.txt.")
            continue
        try:
            _set(data, path.strip().split("."), parse_yaml(value, f"--set {text}"))
        except UserError as error:
            problems += [problem if problem.startswith("--set") else f"--set {text}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)
    return data


def _set(node: Any, path: list[str], value: Any) -> None:
    *parents, last = path
    for part in parents:
        if isinstance(node, dict) and not isinstance(node.get(_key(node, part)), dict | list):
            node[_key(node, part)] = {}  # a missing or plain value on the way becomes a mapping; the schema judges its keys
        node = node[_index(node, part)]
    if not isinstance(node, dict | list):
        raise UserError(f"{'.'.join(parents)} holds the plain value {node!r}; nothing can be set inside it.")
    node[_index(node, last)] = value


def _key(node: dict, part: str) -> Any:
    """YAML keys may be numbers (layers): use the one that is there."""
    return int(part) if part not in node and part.isdigit() and int(part) in node else part


def _index(node: Any, part: str) -> Any:
    if isinstance(node, dict):
        return _key(node, part)
    if not isinstance(node, list):
        raise UserError(f"{part!r} is asked for inside the plain value {node!r}.")
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"{part!r} is no position in a list of {len(node)} (the first is 0).")
    return int(part)


def expand(value: Any) -> Any:
    """${NAME} and ${NAME:-default} in every string, from the environment. Raises one UserError that names every unset variable."""
    missing: list[str] = []

    def one(match: re.Match) -> str:
        name, default = match.groups()
        if default is None and name not in os.environ:
            missing.append(name)
        return os.environ.get(name) or default or ""

    def walk(node: Any) -> Any:
        if isinstance(node, str):
            return _VARIABLE.sub(one, node)
        if isinstance(node, dict):
            return {key: walk(item) for key, item in node.items()}
        return [walk(item) for item in node] if isinstance(node, list) else node

    expanded = walk(value)
    if missing:
        raise UserError(
            *(f"${{{name}}} is used but {name} is not set: export {name}=... or write ${{{name}:-default}}." for name in missing)
        )
    return expanded


# ---- pydantic's errors as sentences ------------------------------------------------------------------------------------------------


def validate(schema: type[BaseModel], data: Any, where: str = "") -> Any:
    """`data` as `schema`; every problem found becomes one sentence of one UserError: path, what was given, what is allowed."""
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise UserError(*_unique(_sentences(schema, error, where))) from None


def _sentences(schema: type[BaseModel], error: ValidationError, where: str) -> Iterator[str]:
    for item in error.errors(include_url=False):
        parents, unknown = (item["loc"][:-1], item["loc"][-1:]) if item["type"] == "extra_forbidden" else (item["loc"], ())
        location = [part for part in parents if not (isinstance(part, str) and "[" in part)] + [*unknown]  # drops names of union branches
        path = where + ".".join(str(part) for part in location)
        if unknown:
            names = _fields(schema, parents)
            yield f"{path}: no such key.{nearest(str(unknown[0]), names)} Allowed here: {', '.join(names)}."
        elif item["type"] == "missing":
            yield f"{path}: needed, but not given."
        else:
            for message in str(item["msg"]).removeprefix("Value error, ").splitlines():
                given = "" if isinstance(item["input"], Mapping | list | BaseModel) else f" Got {item['input']!r}."
                text = message if message.endswith(".") else message + "."
                yield f"{path + ': ' if path else ''}{text}{given if item['type'] != 'value_error' else ''}"


def _fields(schema: Any, location: tuple) -> list[str]:
    """Names of the fields of the model found at `location` inside `schema`."""
    for part in location:
        if isinstance(schema, type) and issubclass(schema, BaseModel) and part in schema.model_fields:
            schema = schema.model_fields[part].annotation
        schema = _model_in(schema) or schema
    schema = _model_in(schema)
    return list(schema.model_fields) if schema else []


def _model_in(hint: Any) -> type[BaseModel] | None:
    """The pydantic model inside a type such as `X | None`, `list[X]` or `Annotated[X, ...]`."""
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and issubclass(hint, BaseModel):
        return hint
    return next((model for argument in typing.get_args(hint) if (model := _model_in(argument))), None)


def _unique(sentences: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(sentences))

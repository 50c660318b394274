"""Extension points are dicts of name -> "module:attribute". Nothing is imported before it is used, and one look shows all there is.

Names found in a downloaded config are looked up in these tables only; they never reach `import_module` as free text.
"""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from subquad.errors import UserError


def nearest(name: str, names: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the closest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_name(kind: str, name: str, names: Iterable[str]) -> None:
    """Raise UserError unless `name` is one of `names`."""
    names = list(names)
    if name not in names:
        raise UserError(f"Unknown {kind} {name!r}.{nearest(name, names)} Known: {', '.join(sorted(names))}.")


def unknown_settings(given: Iterable[str], known: Iterable[str], where: str = "") -> list[str]:
    """A sentence for every key of `given` that is not in `known`; where: what stands before a key, for example 'perplexity.'."""
    known = list(known)
    return [f"{where}{key}: no such setting.{nearest(key, known)} Settings: {', '.join(known)}." for key in given if key not in known]


def lookup(kind: str, name: str, table: Mapping[str, str]) -> Any:
    """The object a table's row names. Raises UserError for an unknown name; a broken import inside the module shows its own traceback."""
    check_name(kind, name, table)
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module, __package__), attribute)

"""A notebook's parameters: declared once, in its parameters cell, and checked against that declaration.

A declaration is one annotated line whose comment is the help, and may end in the allowed values:

    keep_ratio: float = 0.9  # share of patches kept per block, in (0, 1]
    mode: str = "mask"  # how patches are dropped, one of mask, gather
"""

import ast
import difflib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERVAL = re.compile(r"\bin ([\[(])\s*(-?[\w.+-]+)\s*,\s*(-?[\w.+-]+)\s*([\])])\s*$")
CHOICES = re.compile(r"\bone of ([^;]+)$")
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list}


class ParameterError(ValueError):
    """Parameters that do not fit their declaration: one line per fault."""


@dataclass
class Parameter:
    """One declared parameter: its type, default, help, and the values its help allows."""

    name: str
    type: type
    default: Any
    help: str

    @property
    def choices(self) -> list[str]:
        """The values that its help lists; [] where it takes any."""
        found = CHOICES.search(self.help)
        return [name.strip() for name in found.group(1).split(",")] if found else []

    def read(self, value: Any) -> Any:
        """value as this parameter's type, or ParameterError. Text from a command line is read where it is exact."""
        converted = _convert(value, self.type)
        if isinstance(converted, list) and INTERVAL.search(self.help):  # YAML reads 1e-3 as text
            whole = bool(self.default) and all(isinstance(item, int) for item in self.default)
            numbers = [_convert(item, int if whole else int | float) for item in converted]
            if None in numbers:
                fault = converted[numbers.index(None)]
                raise ParameterError(f"{self.name} holds {fault!r}: expected {'whole ' * whole}numbers")
            converted = numbers
        if converted is None:
            hint = " (quote it: papermill -r keeps text as it is)" if self.type is str else ""
            raise ParameterError(f"{self.name} is {value!r}: expected {self.type.__name__}{hint}")
        self._check_values(converted)
        return converted

    def _check_values(self, value: Any) -> None:
        interval, names = INTERVAL.search(self.help), self.choices
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) and not value and "may be empty" not in self.help:
            raise ParameterError(f"{self.name} is an empty list: expected at least one value")
        for item in values:
            if isinstance(item, float) and not math.isfinite(item):
                raise ParameterError(f"{self.name} is {item}: expected a finite number")
            if interval and isinstance(item, int | float):
                left, low, high, right = interval.groups()
                above = item >= float(low) if left == "[" else item > float(low)
                below = item <= float(high) if right == "]" else item < float(high)
                if not (above and below):
                    raise ParameterError(f"{self.name} is {item}: expected a value {interval.group().strip()}")
            if names and str(item) not in names:
                near = difflib.get_close_matches(str(item), names, n=1)
                hint = f", did you mean {near[0]}?" if near else ""
                raise ParameterError(f"{self.name} is {item!r}: expected one of {', '.join(names)}{hint}")


def _convert(value: Any, kind: type) -> Any:
    """value as `kind` if that loses nothing, else None. papermill hands over '1e-4' and '[1, 2]' as text."""
    if kind is not str and isinstance(value, str):
        try:
            value = ast.literal_eval(value.title() if value.lower() in ("true", "false") else value)
        except (ValueError, SyntaxError, TypeError):
            return None
    if kind is list and isinstance(value, tuple):
        return list(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    # bool is an int to Python, not to a reader
    fits = isinstance(value, kind) and (kind is bool) == isinstance(value, bool)
    return value if fits else None


def declared(source: str) -> dict[str, Parameter]:
    """The parameters that a parameters cell declares; {} if `source` is not purely such declarations."""
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return {}
    if not body or not all(isinstance(node, ast.AnnAssign) and node.value is not None for node in body):
        return {}
    lines, found = source.splitlines(), {}
    for node in body:
        name, kind = node.target.id, ast.unparse(node.annotation).split("[")[0]
        if kind not in TYPES:
            raise ParameterError(f"{name} is declared as {kind}: expected one of {', '.join(TYPES)}")
        text = lines[node.end_lineno - 1][node.end_col_offset :].strip().lstrip("#").strip()
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise ParameterError(f"{name} is {ast.unparse(node.value)}: expected a plain value") from None
        found[name] = Parameter(name, TYPES[kind], default, text)
    return found


def declared_in(notebook: Path) -> dict[str, Parameter]:
    """The parameters that a notebook file declares in its cell tagged `parameters`."""
    for cell in json.loads(notebook.read_text())["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            return declared("".join(cell["source"]))
    raise ParameterError(f"{notebook.name} has no cell tagged parameters")


def check(declaration: dict[str, Parameter], values: dict[str, Any]) -> dict[str, Any]:
    """All declared parameters with `values` in place of defaults; ParameterError lists every fault, a line each."""
    faults, read = [], {}
    for name in values:
        if name not in declaration:
            near = difflib.get_close_matches(name, declaration, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(declaration)}"
            faults.append(f"{name} is not a parameter of this notebook: {hint}")
    for name, parameter in declaration.items():
        try:
            read[name] = parameter.read(values.get(name, parameter.default))
        except ParameterError as error:
            faults.append(str(error))
    if faults:
        raise ParameterError("\n".join(faults))
    return read


def _declared_if_any(source: str) -> dict[str, Parameter]:
    try:
        return declared(source)
    except ParameterError:  # annotated, but nothing that a parameters cell may hold
        return {}


def from_namespace(
    namespace: dict[str, Any], shipped: dict[str, Parameter] | None = None
) -> tuple[dict[str, Parameter], dict[str, Any]]:
    """What a running notebook declares, and the values set since: by its own cell, or injected by papermill.

    Read from IPython's history of executed cells, so it works wherever the notebook runs from, and on a copy of it.
    shipped: what its file declares, for `%run`, which leaves no history.
    """
    cells = namespace.get("In", [])
    found = {index: names for index, source in enumerate(cells) if (names := _declared_if_any(source))}
    if not found and shipped and shipped.keys() <= namespace.keys():
        return shipped, {name: namespace[name] for name in shipped}
    if not found:
        raise ParameterError("no parameters cell has run: run the notebook from its top")
    first = found[min(found)]  # in a kernel that lives on, later cells may declare variables of their own
    at = max(index for index, names in found.items() if names.keys() & first.keys())
    declaration = found[at]
    injected = [source for source in cells[at + 1 :] if source.startswith("# Parameters\n")]
    names = {target.id for source in injected for node in ast.parse(source).body if isinstance(node, ast.Assign)
             for target in node.targets}  # fmt: skip
    return declaration, {name: namespace[name] for name in [*declaration, *sorted(names - {*declaration})]}

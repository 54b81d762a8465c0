"""Reads the imports of a source file and says which of them break the layering contract."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass

PACKAGE = "lightning_gradflow"

RANKS = {
    "activations": 0,
    "metrics": 0,
    "history": 1,
    "findings": 1,
    "detectors": 2,
    "advice": 2,
    "border": 2,
    "figures": 3,
    "probes": 4,
    "sinks": 4,
    "remedies": 5,  # a remedy may measure what it did
    "recorder": 6,
    "callbacks": 7,
    "gradflow": 8,
    "entry_point": 9,
    "__init__": 9,
}
"""Every room; a room may import from itself and from rooms of a lower rank."""

PURE = {"activations", "metrics", "history", "findings", "detectors", "advice", "border"}
"""Numpy and the standard library alone, in functions too."""

KNOW_TORCH = {"probes", "remedies", "recorder", "callbacks", "gradflow", "entry_point", "__init__"}
"""May import torch and torchmetrics at module level."""

KNOW_LIGHTNING = {"callbacks", "gradflow", "entry_point", "__init__"}
"""May import Lightning; in sinks and figures it is allowed inside of functions, where nothing is imported early."""

LAZY = {"wandb", "matplotlib", "plotly", "rich", "tensorboard", "tensorboardX", "torch.utils.tensorboard"}
"""Imported where they are used and never at module level, in any room."""

LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
TORCH = {"torch", "torchmetrics"}


@dataclass(frozen=True)
class Import:
    """One imported module: its dotted name, and whether it is loaded when the file is imported, when a function
    runs, or only for the type checker.
    """

    module: str
    line: int
    when: str


def imports(source: str, module: str) -> Iterator[Import]:
    """All imports of a file, wherever they stand; `module` is the file's own dotted name."""
    yield from _walk(ast.parse(source).body, module, "import")


def _walk(nodes: list[ast.AST], module: str, when: str) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module)
            # `from package import name` may name a module: the longer name is judged too
            yield from (Import(f"{base}.{alias.name}", node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(list(ast.iter_child_nodes(node)), module, "call")
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _walk(list(node.body), module, "types")
            yield from _walk(list(node.orelse), module, when)
        else:
            yield from _walk(list(ast.iter_child_nodes(node)), module, when)


def _base(node: ast.ImportFrom, module: str) -> str:
    if node.level == 0:
        return node.module or ""
    parent = module.split(".")[: -node.level]
    return ".".join([*parent, *([node.module] if node.module else [])])


def violations(source: str, module: str) -> list[str]:
    """What breaks the contract in a file, one line each.

    Args:
        source: the text of the file.
        module: its dotted name; a package's own file ends in `.__init__`.
    """
    room = module.split(".")[1]
    if room not in RANKS:
        return [f"{module}: {room} is in no room; give it a rank"]
    found = []
    for item in imports(source, module):
        reason = _own(room, item) if item.module.split(".")[0] == PACKAGE else _foreign(room, item)
        if reason:
            found.append(f"{module}:{item.line}: {room} must not import {item.module}: {reason}")
    return sorted(set(found))


def _own(room: str, item: Import) -> str:
    other = [*item.module.split("."), "__init__"][1]
    other = other if other in RANKS else "__init__"
    if other == room or RANKS[other] < RANKS[room]:
        return ""
    if item.module == f"{PACKAGE}.__version__":
        return ""
    return "imports run one way"


def _foreign(room: str, item: Import) -> str:
    top = item.module.split(".")[0]
    if item.when == "import" and any(f"{item.module}.".startswith(f"{lazy}.") for lazy in LAZY):
        return "it is imported where it is used"
    if room in PURE:
        return "" if top == "numpy" or top in sys.stdlib_module_names else "the room is pure"
    if top in TORCH and item.when == "import" and room not in KNOW_TORCH:
        return "it is not needed to import the room"
    if top in LIGHTNING and room not in KNOW_LIGHTNING:
        if room in {"sinks", "figures"}:
            return "it is not needed to import the room" if item.when == "import" else ""
        return "" if item.when == "types" else "the room does not know Lightning"
    return ""

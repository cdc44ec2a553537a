"""The mutants of a module, as mutmut makes them, less those that only change a message."""

import difflib
import importlib
import random
from pathlib import Path
from typing import NamedTuple

import libcst as cst
from libcst.metadata import MetadataWrapper
from mutmut.mutation.file_mutation import MutationVisitor, deep_replace
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

MESSAGES = ("advice", "_ADVICE", "detail")  # names of what is part of a message


class Mutant(NamedTuple):
    """One change of one function.

    module: its dotted name.
    function: the name of the function, with that of its class if it has one.
    diff: the lines taken out and put in.
    source: the whole module after the change.
    """

    module: str
    function: str
    diff: str
    source: str


def sample(module: str, count: int, seed: int) -> tuple[list[Mutant], int]:
    """Draw `count` of a module's mutants, each with the same probability; and how many there are."""
    path = Path(importlib.import_module(module).__file__)
    wrapper = MetadataWrapper(cst.parse_module(path.read_text()))
    visitor = MutationVisitor(mutation_operators, IgnoredCode(set(), set(), set()))
    tree = wrapper.visit(visitor)
    names, texts = dict(_functions(tree.body)), _inside_texts(tree)
    counted = [m for m in visitor.mutations if m.contained_by_top_level_function in names and not _is_text(m, texts)]
    drawn = random.Random(f"{seed} {module}").sample(counted, min(count, len(counted)))
    return [_mutant(module, names[m.contained_by_top_level_function], tree, m) for m in drawn], len(counted)


def functions(module: str) -> list[str]:
    """The names of a module's functions and methods."""
    tree = cst.parse_module(Path(importlib.import_module(module).__file__).read_text())
    return [name for _, name in _functions(tree.body)]


def _mutant(module: str, function: str, tree: cst.Module, mutation) -> Mutant:
    source = deep_replace(tree, mutation.original_node, mutation.mutated_node).code
    lines = difflib.unified_diff(tree.code.splitlines(), source.splitlines(), n=0, lineterm="")
    diff = "\n".join(line for line in lines if not line.startswith(("---", "+++")))
    return Mutant(module, function, diff, source)


def _functions(body, owner: str = ""):
    for node in body:
        if isinstance(node, cst.FunctionDef) and not node.decorators:
            yield node, owner + node.name.value
        elif isinstance(node, cst.ClassDef):
            yield from _functions(node.body.body, f"{node.name.value}.")


def _is_message(node) -> bool:
    """Whether a node is an f-string, or a string that reads as a sentence or a call and not as a name."""
    if isinstance(node, cst.Name):
        return node.value in MESSAGES
    if isinstance(node, cst.SimpleString):
        return any(sign in node.value for sign in " `(=")
    return isinstance(node, cst.FormattedString | cst.ConcatenatedString)


def _checks(node) -> bool:
    """Whether a node calls a check, whose strings are names for its message."""
    return isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value.startswith("check_")


def _inside_texts(tree: cst.Module) -> set[int]:
    """The ids of all nodes in messages."""
    inside: set[int] = set()

    class Visitor(cst.CSTVisitor):
        def on_visit(self, node):
            if _is_message(node) or id(node) in inside:
                inside.update(id(child) for child in (node, *node.children))
            if _checks(node):
                inside.update(id(arg.value) for arg in node.args if isinstance(arg.value, cst.SimpleString))
            return True

    tree.visit(Visitor())
    return inside


def _is_text(mutation, texts: set[int]) -> bool:
    """Whether a mutation changes, drops or hides a message and nothing else."""
    old, new = mutation.original_node, mutation.mutated_node
    if id(old) in texts:
        return True
    if isinstance(old, cst.Assign):
        return _is_message(old.value)
    if isinstance(old, cst.Call) and isinstance(new, cst.Call) and old.func is new.func:
        kept = {id(arg) for arg in new.args}
        return all(_is_message(arg.value) or id(arg.value) in texts for arg in old.args if id(arg) not in kept)
    return False

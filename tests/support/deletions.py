"""Faults that Cosmic Ray does not have: a statement that is gone, and a keyword argument that is gone.

Cosmic Ray finds them by an entry point, which mutants.py writes into its copy of the repository. They work on parso's
nodes, and need nothing of Cosmic Ray's own but the names of the methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Place = tuple[int, int]
"""Line and column."""

_STAY = frozenset({"string", "import_name", "import_from", "global_stmt", "nonlocal_stmt", "keyword", "assert_stmt"})
"""Kinds of statement whose deletion changes nothing, or nothing that a test could notice."""


class _Deletion:
    """What Cosmic Ray asks of an operator, but for the deletion itself."""

    @classmethod
    def arguments(cls) -> tuple[()]:
        """The operator has no settings."""
        return ()

    @classmethod
    def examples(cls) -> tuple[()]:
        """None: these classes are tested in test_support.py."""
        return ()


class DeleteStatement(_Deletion):
    """Puts `pass` in the place of a statement in a function."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Place, Place]]:
        """Where the node can be deleted: once if it is such a statement, else nowhere."""
        if node.type == "simple_stmt" and _is_in_function(node):
            first = node.children[0]
            is_annotation = first.type == "expr_stmt" and "=" not in first.get_code()
            if first.type not in _STAY and not is_annotation and not first.get_code().strip().startswith("logger."):
                yield first.start_pos, first.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """The node with the statement gone."""
        import parso  # comes with Cosmic Ray

        gone = node.children[0]
        instead = parso.parse("pass\n").children[0].children[0]
        instead.prefix = gone.get_first_leaf().prefix
        node.children[0] = instead
        return node


class DeleteArgument(_Deletion):
    """Takes a keyword argument out of a call that has others."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Place, Place]]:
        """Where the node can be deleted from: each keyword argument if it is a call's list of arguments."""
        for argument in _keywords(node):
            yield argument.start_pos, argument.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        """The node without its keyword argument number `index`, and without the comma beside it."""
        at = node.children.index(_keywords(node)[index])
        del node.children[at : at + 2]
        return node


class Provider:
    """The two by their names, for Cosmic Ray."""

    def __iter__(self) -> Iterator[str]:
        return iter(_OPERATORS)

    def __getitem__(self, name: str) -> type[_Deletion]:
        return _OPERATORS[name]


_OPERATORS: dict[str, type[_Deletion]] = {each.__name__: each for each in (DeleteStatement, DeleteArgument)}


def _is_in_function(node: Any) -> bool:
    while node is not None and node.type != "funcdef":
        node = node.parent
    return node is not None


def _keywords(node: Any) -> list[Any]:
    if node.type != "arglist":
        return []
    return [each for each in node.children if each.type == "argument" and each.children[1] == "="]

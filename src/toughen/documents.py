"""Plain values from YAML of anybody's: no code, no bombs, no surprises. Knows nothing of what the values mean."""

from collections import Counter
from typing import Any

import yaml

from toughen.errors import InputError

_MOST_LETTERS = 2**20
_MOST_VALUES = 100_000
_DEEPEST = 50
_MOST_BITS = 64  # of a whole number; Python itself refuses to print those of some thousand digits
_MOST_DIGITS = 100  # with underscores, and in base 2


def parse_yaml(text: str, *, what: str) -> Any:
    """Read one YAML document of plain values.

    An alias counts with everything behind it each time that it is used, so that a few lines cannot stand for more than
    the memory holds.

    Args:
        text: YAML.
        what: What it is, for messages, for example ``"recipe digits"``.

    Raises:
        InputError: It is no YAML, it asks for other things than plain values, a mapping has a key twice, or it is
            larger than any recipe: a MiB of text, 100,000 values, 50 levels, or a whole number of more than 64 bits.
    """
    if len(text) > _MOST_LETTERS:
        raise InputError(f"{what} has {len(text):,} letters; at most {_MOST_LETTERS:,} are read")
    try:
        loader = _Bounded(text, what)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _MOST_VALUES:
            raise InputError(f"{what} stands for more than {_MOST_VALUES:,} values, through its aliases")
        return loader.construct_document(node)
    except InputError:
        raise
    except yaml.YAMLError as error:
        raise InputError(f"{what} is not valid YAML: {_reason(error)}") from None
    except (ValueError, OverflowError, TypeError, AttributeError) as error:  # a thirteenth month, !!timestamp of a word
        raise InputError(f"{what} holds a value that is not of its kind: {error}") from None


def _reason(error: yaml.YAMLError) -> str:
    """Say what is wrong and where, without the excerpt that takes lines of its own."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return " ".join(str(error).split())


class _Bounded(yaml.SafeLoader):
    """The safe loader, which stops before it nests too deep for Python's stack, or reads an absurd number."""

    def __init__(self, text: str, what: str) -> None:
        super().__init__(text)
        self.what = what
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise InputError(f"{self.what} nests more than {_DEEPEST} levels")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # PyYAML would take the last of two equal keys, and lose what the first one says
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for (_, key), times in keys.items():
            if times > 1:
                raise InputError(f"{self.what} has the key {key!r} twice in one mapping; rename or drop one of them")
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number: int = super().construct_yaml_int(node) if len(node.value) <= _MOST_DIGITS else 2**_MOST_BITS
        if number.bit_length() > _MOST_BITS:
            raise InputError(f"{self.what} holds the number {node.value[:20]}..., of more than {_MOST_BITS} bits")
        return number


_Bounded.add_constructor("tag:yaml.org,2002:int", _Bounded.construct_yaml_int)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node stands for, with those behind aliases each time that they are used."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _MOST_VALUES + 1  # met again inside itself, it would be without end
        pairs = node.value if isinstance(node, yaml.MappingNode) else [(child,) for child in node.value]
        known[id(node)] = 1 + sum(_size(child, known) for pair in pairs for child in pair)
    return known[id(node)]

"""One small registry class, whose instances live with their kind; and what users bring from their own packages."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from toughen.errors import InputError, first_line, unknown

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Things of one kind by name. Registering a name twice is an error; an unknown name lists near ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that stores its argument under ``name`` and hands it back unchanged."""

        def store(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return store

    def __getitem__(self, name: str) -> T:
        """Look a name up.

        Raises:
            InputError: Nothing is registered under this name.
        """
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def name_of(self, entry: object) -> str:
        """Return the first name under which ``entry`` is registered.

        Raises:
            ValueError: It is not registered.
        """
        for name, value in self._entries.items():
            if value is entry:
                return name
        raise ValueError(f"{entry!r} is not a registered {self.kind}")


def imported(spec: str, *, what: str) -> Callable[..., Any]:
    """Import what ``package.module:name`` names, a function or a class.

    Only where Python itself looks: a recipe's folder may come from anywhere, and must not bring code along.

    Args:
        spec: As a user writes it.
        what: What it is for, for the message, for example ``"model"``.

    Raises:
        InputError: There is no such module, or nothing of that name to call in it.
    """
    place, _, name = spec.partition(":")
    if place.startswith("."):
        raise InputError(f"{what} {spec!r} starts with a dot; name its module in full, as in package.module:{name}")
    try:
        module = importlib.import_module(place)
    except (ImportError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{what} {spec!r} cannot be imported ({first_line(error)}); install its package, or set PYTHONPATH to the"
            " folder that it is in"
        ) from error
    if not callable(function := vars(module).get(name)):
        raise unknown(f"function in {place}", name, [key for key, value in vars(module).items() if callable(value)])
    found: Callable[..., Any] = function
    return found

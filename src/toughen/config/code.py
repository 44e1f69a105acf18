"""Whether a recipe may name code of other packages. What the user typed may; what stands in a file must be allowed."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from toughen.errors import InputError

VARIABLE = "TOUGHEN_ALLOW_CODE"


@dataclass(frozen=True)
class Permission:
    """Which ``package.module:name`` a document may name. Importing one runs code, whatever it then turns out to be.

    Args:
        source: What the document is, for messages, for example ``"recipe mine.yaml"``.
        packages: Top-level packages whose names are allowed.
    """

    source: str
    packages: frozenset[str] = frozenset()

    @classmethod
    def of_user(cls, source: str, packages: Iterable[str] = ()) -> "Permission":
        """Allow what the user allows: these packages, and those of the environment variable, parted by commas."""
        return cls(source, frozenset({*packages, *allowed_everywhere()}))

    def check(self, spec: str) -> None:
        """Refuse code that nobody allowed, before it is imported.

        Args:
            spec: Any name of a method or a model; one without a colon is never refused.

        Raises:
            InputError: It names code; how to allow it.
        """
        package = spec.partition(":")[0].partition(".")[0]
        if ":" in spec and not package.isidentifier():
            raise InputError(f"{self.source} names {spec!r}, which is not of the form package.module:name")
        if ":" in spec and package not in self.packages:
            raise InputError(
                f"{self.source} names code that is not toughen's, {spec!r}, and to import it is to run it; if you trust"
                f" it, add --allow-code {package}, or set {VARIABLE}={package}"
            )


def allowed_everywhere() -> list[str]:
    """Return the packages that the environment variable names."""
    return [package.strip() for package in os.environ.get(VARIABLE, "").split(",") if package.strip()]


def packages_named(words: Iterable[str]) -> list[str]:
    """Return the packages of every ``package.module:name`` in words that the user typed, such as overrides."""
    return [package for word in words for package in re.findall(r"\b(\w+)(?:\.\w+)*:\w", word)]

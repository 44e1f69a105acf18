"""Recipe files: reading, overriding and checking them, until a ``Recipe`` stands."""

from toughen.config.build import build
from toughen.config.code import Permission, packages_named
from toughen.config.dotted import set_keys
from toughen.config.load import (
    ATTACKS,
    extended,
    load_recipe,
    network_of,
    parse_override,
    read_document,
    recipe_names,
    recipe_of,
    resolve,
)

__all__ = [
    "ATTACKS",
    "Permission",
    "build",
    "extended",
    "load_recipe",
    "network_of",
    "packages_named",
    "parse_override",
    "read_document",
    "recipe_names",
    "recipe_of",
    "resolve",
    "set_keys",
]

"""Recipe files: reading, overriding and checking them, until a ``Recipe`` stands."""

from toughen.config.build import build
from toughen.config.load import ATTACKS, load_recipe, network_of, read_document, recipe_names, resolve

__all__ = ["ATTACKS", "build", "load_recipe", "network_of", "read_document", "recipe_names", "resolve"]

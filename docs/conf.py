"""The documentation site: ``sphinx-build -W docs site``. Sphinx and MyST, since they are kept; nothing from outside."""

import toughen

project, author, release = "Toughen", "The Toughen developers", toughen.__version__
copyright = author
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["**.ipynb_checkpoints"]

html_theme = "furo"
html_title = "Toughen"
html_copy_source = False
html_static_path, html_css_files = ["site.css"], ["site.css"]

myst_heading_anchors = 3
nb_execution_mode = "off"  # a test runs the notebooks

autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False

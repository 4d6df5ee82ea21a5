"""How the pages are made: `sphinx-build -W -b html docs build/docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from sakd import __version__

project = "sakd"
release = __version__
copyright = "the authors of sakd"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_click",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "sakd"
html_static_path = ["static"]
html_css_files = ["tables.css"]
myst_enable_extensions = ["attrs_inline"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
nitpicky = False

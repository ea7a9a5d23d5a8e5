"""The documentation's site: `make docs` builds it with Sphinx from the repository's Markdown.

The source folder is the repository, so that a link between two files is the same on a code host and
on the site. What is not a page of the site is excluded below.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

from sphinx.application import Sphinx  # noqa: E402

import b2ray  # noqa: E402

project, author, version = "b2ray", "the b2ray authors", b2ray.__version__
project_copyright = "Apache-2.0"
root_doc = "README"  # with the contents of docs/_contents.md, which a code host need not show
include_patterns = [
    "docs/**",
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *("cluster/README.md", "deploy/README.md", "b2ray/shapes/weights/README.md"),
]
exclude_patterns = ["docs/_*", "build", "runs", "tests", ".*", "**/__pycache__"]

extensions = [
    *("myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"),
    *("configuration", "commands", "mathml"),  # of docs/_ext
]
smartquotes = False  # --config is no dash
suppress_warnings = ["myst.header"]  # a page may begin below the first level

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_fence_as_directive = ["math"]  # as code hosts show it
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_use_legacy_class_based = False
default_role = "literal"
napoleon_use_ivar = True
html_math_renderer = "mathml"

copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"b2ray {version}"
html_baseurl = ""
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_extra"]  # an index.html that leads to README.html
html_show_sourcelink = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def with_contents(_app: Sphinx, name: str, source: list[str]) -> None:
    """The first page ends with the site's contents, from which the sidebar is made."""
    if name == root_doc:
        source[0] += "\n" + (ROOT / "docs" / "_contents.md").read_text(encoding="utf-8")


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.connect("source-read", with_contents)

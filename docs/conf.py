"""Sphinx: `make docs` builds these pages and the API reference into build/site."""

from dinofast import __version__ as release

project, author = "dinofast", "the dinofast authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 4                               # as GitHub makes them
default_role = "code"                                  # docstrings are written with single backticks
autodoc_member_order, autodoc_typehints = "bysource", "signature"
python_use_unqualified_type_names = True
html_theme, html_title, html_show_copyright = "furo", f"dinofast {release}", False
html_static_path, html_css_files = ["_static"], ["site.css"]
pygments_style, pygments_dark_style = "friendly", "monokai"


def show_formulas(app, what, name, obj, options, lines: list[str]) -> None:
    """Indented lines after an empty one are formulas or code in our docstrings: shown as they are, not as a quotation."""
    shown, above = [], ""
    for i, line in enumerate(lines):
        begins = line.startswith("    ") and i and not lines[i - 1].strip() and above and above[0] not in " :.*-"
        shown += ["::", "", line] if begins else [line]
        above = line if line.strip() else above
    lines[:] = shown


def setup(app) -> None:
    app.connect("autodoc-process-docstring", show_formulas, priority=900)     # after napoleon

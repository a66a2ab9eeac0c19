"""Sphinx: `make docs` builds these pages and the API reference into build/site."""

from dataclasses import fields, is_dataclass

from dinofast import __version__ as release

project, author = "dinofast", "the dinofast authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_heading_anchors = 4  # as GitHub makes them
default_role = "code"  # docstrings are written with single backticks
autodoc_member_order, autodoc_typehints = "bysource", "signature"
python_use_unqualified_type_names = True
html_theme, html_title, html_show_copyright = "furo", f"dinofast {release}", False
html_static_path, html_css_files = ["_static"], ["site.css"]
pygments_style, pygments_dark_style = "friendly", "monokai"


def show_formulas(app, what, name, obj, options, lines: list[str]) -> None:
    """Indented lines after an empty one are formulas or code in our docstrings: shown as they are,
    not as a quotation."""
    shown, above = [], ""
    for i, line in enumerate(lines):
        begins = (
            line.startswith("    ")
            and i
            and not lines[i - 1].strip()
            and above
            and above[0] not in " :.*-"
        )
        shown += ["::", "", line] if begins else [line]
        above = line if line.strip() else above
    lines[:] = shown


def list_options(app, what, name, obj, options, lines: list[str]) -> None:
    """Options with default and advice, which their dataclass holds as metadata."""
    if (
        what == "class"
        and is_dataclass(obj)
        and all("help" in field.metadata for field in fields(obj))
    ):
        for field in fields(obj):
            if "topic" in field.metadata:
                lines += [f"**{field.metadata['topic']}**", ""]
            lines += [
                f"``{field.name}`` = {'auto' if field.default is None else field.default}",
                f"    {field.metadata['help']}",
                "",
            ]


def short_signature(
    app, what, name, obj, options, signature: str, result: str
) -> tuple[str, str] | None:
    """Not sixty options in a row."""
    return (
        ("(**options)", result)
        if what == "class" and is_dataclass(obj) and len(fields(obj)) > 20
        else None
    )


def setup(app) -> None:
    app.connect("autodoc-process-docstring", list_options)
    app.connect("autodoc-process-signature", short_signature)
    app.connect("autodoc-process-docstring", show_formulas, priority=900)  # after napoleon

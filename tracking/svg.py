"""Figures as SVG within a page: their text and axes take the page's colours, so that they suit a dark page too."""

import io
import re

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

# Matplotlib's own colours of text, axes and backgrounds -> variables of the page's style sheet
COLOURS = {"#000000": "var(--ink)", "#ffffff": "var(--paper)", "#6b7280": "var(--soft)"}


def draw(figure: Figure, alt: str) -> Markup:
    """The figure as an `svg` element with its text as text; `alt` says what it shows. Equal figures are equal text."""
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "raylab"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|\n\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[\w.]+">', "<g>", text)  # names of groups, which other figures have too
    text = re.sub(r"<[^>]*>", lambda found: _simplify(found[0]), text)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None, "matplotlib writes a viewBox"
    start = f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {size[1]} {size[2]}" style="width:{size[1]}pt">'
    return Markup(start + text[text.index(">") + 1 :])


def _simplify(tag: str) -> str:
    """A tag with the page's fonts and colours, and lengths to a hundredth of a point."""
    tag = re.sub(r" ?font-family: [^;\"]*;?", "", tag).replace("xlink:href", "href")
    tag = re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", tag)
    return re.sub(r"#[0-9a-f]{6}", lambda found: COLOURS.get(found[0], found[0]), tag)

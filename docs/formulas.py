"""Formulas in LaTeX become MathML while the pages are built: a browser sets it without a script, a font or the network.

pymdownx.arithmatex finds them: blocks of the language ``math``, and ``$…$`` in a line.
"""

import html
import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[([](.*?)\\[)\]]</\1>', re.DOTALL)
DISPLAY = {"span": "inline", "div": "block"}


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs asks for a page's HTML before it goes into the template."""
    return FORMULA.sub(lambda found: _placed(found[1], mathml(html.unescape(found[2]), DISPLAY[found[1]])), content)


def _placed(tag: str, formula: str) -> str:
    # A block that is wider than a telephone scrolls, also by the keyboard.
    return formula if tag == "span" else f'<div class="formula" tabindex="0">{formula}</div>'


def mathml(latex: str, display: str) -> str:
    """A formula as MathML, ``inline`` or ``block``.

    Raises:
        ValueError: it has a command that is not known, or does not come out whole.
    """
    try:
        formula = convert(latex, display=display)
        tree = ElementTree.fromstring(formula)
    except Exception as error:
        raise ValueError(f"no formula: {latex.strip()} ({error!r})") from error
    # The converter lets both of these pass.
    unknown = [text for text in tree.itertext() if "\\" in text]
    halves = [fraction for fraction in tree.findall(".//{*}mfrac") if len(fraction) != 2]
    if unknown or halves:
        raise ValueError(f"no formula: {latex.strip()} ({', '.join(unknown) or 'half a fraction'})")
    return formula

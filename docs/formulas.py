"""Convert LaTeX formulas to MathML while the pages are built, so that browsers need no script, font or network for them.

pymdownx.arithmatex finds the formulas: blocks of the language ``math``, and ``$…$`` within a line.
"""

import html
import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[([](.*?)\\[)\]]</\1>', re.DOTALL)
DISPLAY = {"span": "inline", "div": "block"}


def on_page_content(content: str, **_: Any) -> str:
    """Replace the formulas in a page's HTML. MkDocs calls this before it fills the template."""
    return FORMULA.sub(lambda match: _placed(match[1], mathml(html.unescape(match[2]), DISPLAY[match[1]])), content)


def _placed(tag: str, formula: str) -> str:
    # The tab index lets users scroll a block that is wider than their phone with the keyboard, too.
    return formula if tag == "span" else f'<div class="formula" tabindex="0">{formula}</div>'


def mathml(latex: str, display: str) -> str:
    """Convert a formula to MathML.

    Args:
        latex: the formula.
        display: ``inline`` or ``block``.

    Raises:
        ValueError: the formula has an unknown command or cannot be converted completely.
    """
    try:
        formula = convert(latex, display=display)
        tree = ElementTree.fromstring(formula)
    except Exception as error:
        raise ValueError(f"cannot convert the formula {latex.strip()} ({error!r})") from error
    # The converter accepts both of these.
    unknown = [text for text in tree.itertext() if "\\" in text]
    halves = [fraction for fraction in tree.findall(".//{*}mfrac") if len(fraction) != 2]
    if unknown or halves:
        raise ValueError(f"cannot convert the formula {latex.strip()} ({', '.join(unknown) or 'incomplete fraction'})")
    return formula

"""Who holds which cases: sites, cases, splits and labels, and one small file per layout on disk."""

from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path

from flapsam.config import Data
from flapsam.errors import FlapsamError, choose
from flapsam.sites import folders
from flapsam.sites.case import Case, Site, Split
from flapsam.sites.labels import IGNORED, LabelMap, label_map
from flapsam.sites.split import draw_test, hold_out_validation

LAYOUTS: Mapping[str, Callable[[Path], list[Case]]] = {
    "folders": folders.read,
}
"""How data lie on disk: name → a function from the data's folder to its cases. A new layout is one entry here."""

__all__ = [
    "IGNORED",
    "LAYOUTS",
    "Case",
    "LabelMap",
    "Site",
    "Split",
    "hold_out_validation",
    "label_map",
    "read_sites",
]


def read_sites(data: Data, seed: int) -> list[Site]:
    """All sites in the order of their names, every case with its split (train, val or test).

    Validation cases are those that the data set's own table names; ``hold_out_validation`` draws others.

    Raises:
        FlapsamError: the folder, the layout or a site's name is wrong.
    """
    if not data.path.is_dir():
        raise FlapsamError(f"{data.path}: no such folder; set data.path to the folder that holds the sites")
    layout = choose("data.layout", data.layout, LAYOUTS)
    sites = [Site(name, tuple(cases)) for name, cases in groupby(layout(data.path), key=lambda case: case.site)]
    names = {site.name for site in sites}
    for field, wanted in (
        ("data.sites", data.sites or []),
        ("data.site_labels", data.site_labels),
        ("data.unseen", data.unseen),
    ):
        for name in wanted:
            if name not in names:
                raise FlapsamError(f"{field}: there is no site '{name}' in {data.path}; it has {', '.join(sorted(names))}")
    if data.sites is not None:
        sites = [site for site in sites if site.name in data.sites]
    return [draw_test(site, data.test_fraction, seed) for site in sites]

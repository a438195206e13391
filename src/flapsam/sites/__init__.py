"""Sites, cases, splits and label values, with one small module per data set or layout."""

from flapsam.sites.case import Case, CaseList, Site
from flapsam.sites.dataset import Dataset, Download
from flapsam.sites.labels import HIDDEN, IGNORED, LabelMap, label_map
from flapsam.sites.reading import DATASETS, find_dataset, list_cases, read_found, read_site, read_sites
from flapsam.sites.split import hold_out_validation, keep_for_training
from flapsam.sites.unused import unused

__all__ = [
    "DATASETS",
    "HIDDEN",
    "IGNORED",
    "Case",
    "CaseList",
    "Dataset",
    "Download",
    "LabelMap",
    "Site",
    "find_dataset",
    "hold_out_validation",
    "keep_for_training",
    "label_map",
    "list_cases",
    "read_found",
    "read_site",
    "read_sites",
    "unused",
]

"""Hippocampus of the Medical Segmentation Decathlon (task 4): T1 MRI, anterior and posterior part, 135 of its 260 pairs.

The files have the decathlon's layout. All cases come from one hospital. The six sites are simulated from differences
between the files (stored type, origin, size and brightness), so they do not stand for hospitals. Cases 2k − 1 and 2k are
the two hippocampi of one subject. Licence CC BY-SA 4.0. A. L. Simpson et al., arXiv 1902.09063 (2019); M. Antonelli et
al., Nature Communications 13, 4128 (2022).
"""

from pathlib import Path

from flapsam.sites.case import CaseList
from flapsam.sites.dataset import Dataset, Download
from flapsam.sites.description import glance
from flapsam.sites.table import SHIPPED, found_by, read_table

TABLE = SHIPPED / "hippocampus.csv"


def read(path: Path) -> CaseList:
    """Read the cases of the table. The decathlon's other cases are left out."""
    return found_by(
        read_table(TABLE),
        lambda row: (path / "imagesTr" / f"{row.case}.nii.gz", path / "labelsTr" / f"{row.case}.nii.gz"),
        "add it, since flapsam's table of the hippocampus lists the case",
    )


def _recognises(path: Path) -> bool:
    description = glance(path)
    return (
        description.get("name") == "Hippocampus"
        and "training" in description
        and any((path / "imagesTr").glob("hippocampus_*.nii.gz"))
    )


DATASET = Dataset(
    name="hippocampus",
    read=read,
    recognises=_recognises,
    labels=lambda path: {"anterior": 1, "posterior": 2},
    layout="dataset.json, imagesTr/hippocampus_001.nii.gz, labelsTr/hippocampus_001.nii.gz",
    title="MSD Hippocampus",
    modality="T1 MRI",
    sites="6, simulated from differences between files; 99 for training, 36 for testing",
    shapes="31–41 × 40–58 × 26–47",
    size="28 MB",
    source="http://medicaldecathlon.com",
    licence="CC-BY-SA-4.0",
    citation="Simpson et al., arXiv 1902.09063; Antonelli et al., Nature Communications 2022",
    download=Download(
        "https://msd-for-monai.s3-us-west-2.amazonaws.com/Task04_Hippocampus.tar",
        folder="Task04_Hippocampus",
        md5="9d24dba78a72977dbd1d2e110310f31b",
    ),
)

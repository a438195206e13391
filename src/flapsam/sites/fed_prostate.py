"""Fed-Prostate: prostates in T2 MRI, six sites (RUNMC, BMC, I2CVB, UCL, BIDMC, HK; the paper's A–F), 116 cases, one class.

The files are ``SITE/Case00.nii.gz`` and ``SITE/Case00_segmentation.nii.gz``, some of them spelled ``_Segmentation``. Label
values above 1 (zones) are merged into 1. The paper clips intensities at the volume's 99th percentile. Q. Liu et al.,
"MS-Net", IEEE TMI 2020, gathered the sites from NCI-ISBI 2013, I2CVB and PROMISE12, whose own terms apply.
"""

from pathlib import Path

from flapsam.sites.case import CaseList
from flapsam.sites.dataset import Dataset
from flapsam.sites.table import SHIPPED, Row, found_by, read_table

TABLE = SHIPPED / "fed_prostate.csv"


def read(path: Path) -> CaseList:
    """Read the cases of the table."""

    def files(row: Row) -> tuple[Path, Path]:
        folder, name = path / row.site, row.case
        spellings = [folder / f"{name}_{word}.nii.gz" for word in ("segmentation", "Segmentation")]
        return folder / f"{name}.nii.gz", next((label for label in spellings if label.exists()), spellings[0])

    return found_by(read_table(TABLE), files, "add it, since Fed-Prostate's table lists the case")


DATASET = Dataset(
    name="fed-prostate",
    read=read,
    recognises=lambda path: any(path.glob("*/Case??_[sS]egmentation.nii.gz")),
    labels=lambda path: {"prostate": [1, 2]},
    layout="SITE/Case00.nii.gz, SITE/Case00_segmentation.nii.gz",
    title="Fed-Prostate",
    modality="T2 MRI",
    sites="6: RUNMC, BMC, I2CVB, UCL, BIDMC, HK with 30, 30, 19, 13, 12, 12 cases; 91 for training, 25 for testing",
    shapes="about 320 × 320 × 20",
    size="about 1 GB",
    source="https://liuquande.github.io/SAML",
    licence="that of NCI-ISBI 2013, I2CVB and PROMISE12",
    citation="Liu et al., MS-Net, IEEE Transactions on Medical Imaging 2020",
    how="Download it through https://liuquande.github.io/SAML, agree to the terms of the three collections, and unpack one "
    "folder per site.",
)

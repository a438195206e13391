"""Fed-KiTS19: kidneys and their tumours in CT, six sites (FLamby's silos 0–5 are A–F), 74 training and 22 test cases.

The files are those of the challenge: ``case_00000/imaging.nii.gz`` and ``segmentation.nii.gz``, with array axis 0 from
top to bottom (axcodes IPL) and 32–1059 × 512 × 512 voxels. Label values above 2 count as tumour, too. The paper clips and
z-scores the intensities of each site separately. The scaling to [0, 1] that follows cancels the z-score, so that only
the clipping remains. Licence CC BY-NC-SA 4.0. N. Heller et al., "The KiTS19 Challenge Data", arXiv 1904.00445 (2019);
J. Ogier du Terrail et al., "FLamby", NeurIPS 2022 (the sites and the split).
"""

from pathlib import Path

from flapsam.sites.case import CaseList
from flapsam.sites.dataset import Dataset
from flapsam.sites.table import SHIPPED, found_by, read_table

TABLE = SHIPPED / "fed_kits19.csv"


def read(path: Path) -> CaseList:
    """Read the cases of FLamby's table. The challenge's other cases are left out."""
    root = path / "data" if (path / "data").is_dir() else path
    return found_by(
        read_table(TABLE),
        lambda row: (root / row.case / "imaging.nii.gz", root / row.case / "segmentation.nii.gz"),
        "add it, since Fed-KiTS19's table lists the case",
    )


DATASET = Dataset(
    name="fed-kits19",
    read=read,
    recognises=lambda path: (
        any(path.glob("case_?????/segmentation.nii.gz")) or any(path.glob("data/case_?????/segmentation.nii.gz"))
    ),
    labels=lambda path: {"kidney": 1, "tumour": [2, 3, 4, 5]},
    layout="case_00000/imaging.nii.gz, case_00000/segmentation.nii.gz",
    title="Fed-KiTS19",
    modality="CT",
    sites="6: A–F with 12, 14, 12, 12, 16, 30 cases; 74 for training, 22 for testing",
    shapes="32–1059 × 512 × 512, slices first",
    size="about 30 GB for the whole challenge",
    source="https://github.com/neheller/kits19",
    licence="CC-BY-NC-SA-4.0",
    citation="Heller et al., arXiv 1904.00445; sites: Ogier du Terrail et al., FLamby, NeurIPS 2022",
    how="Clone https://github.com/neheller/kits19, run starter_code/get_imaging.py in it, and use its folder data.",
)

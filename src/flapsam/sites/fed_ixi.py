"""Fed-IXI: brains in T1 MRI, three sites (Guys, HH, IOP), 453 training and 113 test cases, one class.

Two layouts are read. IXI Tiny has ``IXI002-Guys-0828/T1/IXI002-Guys-0828_image.nii.gz`` and
``…/label/IXI002-Guys-0828_label.nii.gz``, 83 × 44 × 55 voxels, with brain masks from ROBEX. Full IXI has
``IXI002-Guys-0828-T1.nii.gz`` and no masks. Put your own into a folder ``masks`` beside the images, under the same names.
Licence CC BY-SA 3.0, https://brain-development.org/ixi-dataset. IXI Tiny: F. Pérez-García et al., TorchIO, 2021; sites
and split: J. Ogier du Terrail et al., FLamby, NeurIPS 2022.
"""

from pathlib import Path

from flapsam.sites.case import CaseList
from flapsam.sites.dataset import Dataset, Download
from flapsam.sites.table import SHIPPED, Row, found_by, read_table

TABLE = SHIPPED / "fed_ixi.csv"
FULL = "-T1.nii.gz"


def read(path: Path) -> CaseList:
    """Read the cases of FLamby's table, in whichever of the two layouts the folder has."""
    root = path / "IXI_sample" if (path / "IXI_sample").is_dir() else path
    # The table names a case by subject and site. The files' names add a third part, the number of the scan.
    names = {_subject(entry.name): entry.name for entry in sorted(root.iterdir()) if entry.name.startswith("IXI")}

    def files(row: Row) -> tuple[Path, Path]:
        name = names.get(row.case, f"{row.case}-????")
        if name.endswith(FULL):
            return root / name, root / "masks" / name
        return root / name / "T1" / f"{name}_image.nii.gz", root / name / "label" / f"{name}_label.nii.gz"

    return found_by(read_table(TABLE), files, "add it, since Fed-IXI's table lists the case")


def _subject(name: str) -> str:
    return "-".join(name.split("-")[:2])


DATASET = Dataset(
    name="fed-ixi",
    read=read,
    recognises=lambda path: any(path.glob("IXI???-*")) or any(path.glob("IXI_sample/IXI???-*")),
    labels=lambda path: {"brain": 1},
    layout="IXI002-Guys-0828/T1/IXI002-Guys-0828_image.nii.gz, …/label/IXI002-Guys-0828_label.nii.gz; or "
    "IXI002-Guys-0828-T1.nii.gz, masks/IXI002-Guys-0828-T1.nii.gz",
    title="Fed-IXI",
    modality="T1 MRI",
    sites="3: Guys, HH, IOP with 311, 181, 74 cases; 453 for training, 113 for testing",
    shapes="83 × 44 × 55 (Tiny)",
    size="about 450 MB (Tiny)",
    source="https://brain-development.org/ixi-dataset",
    licence="CC-BY-SA-3.0",
    citation="IXI; Pérez-García et al., TorchIO, 2021; sites: Ogier du Terrail et al., FLamby, NeurIPS 2022",
    download=Download(
        "https://prod-dcd-datasets-cache-zipfiles.s3.eu-west-1.amazonaws.com/7kd5wj7v7p-3.zip", folder="7kd5wj7v7p-3"
    ),
)

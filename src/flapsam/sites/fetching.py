"""Descriptions and downloads of data sets, for the command line."""

import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

from flapsam.base.download import download
from flapsam.base.errors import FlapsamError, choose
from flapsam.base.files import make_folder
from flapsam.run.observer import Observer, watched
from flapsam.sites import DATASETS


def about(name: str) -> dict[str, str]:
    """Describe a data set.

    Raises:
        FlapsamError: the name is unknown.
    """
    dataset = choose("data set", name, DATASETS)
    labels = dict(dataset.labels(Path())) if dataset.named else {}
    return {
        "what": dataset.title,
        "modality": dataset.modality,
        "files": dataset.layout,
        "classes": ", ".join(f"{label}: {value}" for label, value in labels.items()) or "from dataset.json or data.labels",
        "sites": dataset.sites,
        "shapes": dataset.shapes,
        "size": dataset.size,
        "source": dataset.source,
        "licence": dataset.licence,
        "citation": dataset.citation,
        "to get it": f"flapsam data get {name} FOLDER" if dataset.download else dataset.how,
    }


def fetch_data(name: str, folder: Path, observer: Observer) -> Path:
    """Download and unpack a data set.

    Args:
        name: the name of the data set.
        folder: the folder to unpack into.
        observer: follows the download.

    Returns:
        The data set's own folder in ``folder``.

    Raises:
        FlapsamError: the name is unknown, the data set is not open to everyone, its folder already exists, or the download
            fails.
    """
    dataset = choose("data set", name, DATASETS)
    if dataset.download is None:
        raise FlapsamError(f"{name}: flapsam cannot download this. {dataset.how}")
    place = folder / dataset.download.folder
    if place.exists():
        raise FlapsamError(f"{place}: already exists; remove it to download it again")
    make_folder(folder, 0o777)
    archive = folder / dataset.download.url.rsplit("/", 1)[-1]
    download(dataset.download.url, archive, md5=dataset.download.md5, on_bytes=watched(observer, name))
    observer.end()
    unpacked = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
    try:
        # Neither way writes outside the folder or creates devices: the filter refuses that in tar archives, shutil in zip.
        if archive.suffix == ".zip":
            shutil.unpack_archive(archive, unpacked)
        else:
            shutil.unpack_archive(archive, unpacked, filter="data")
        inside = unpacked / dataset.download.folder
        (inside if inside.is_dir() else unpacked).rename(place)
    except (shutil.ReadError, tarfile.TarError, zipfile.BadZipFile, OSError, ValueError) as error:
        raise FlapsamError(f"{archive}: cannot be unpacked; remove it and run the same command again") from error
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    archive.unlink()
    return place

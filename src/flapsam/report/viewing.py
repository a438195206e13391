"""The two things that ``flapsam view`` opens: a run with its report, or a single image."""

import tempfile
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flapsam.adapters.store import read_card
from flapsam.adapters.trained import find_trained
from flapsam.base.errors import FlapsamError
from flapsam.base.files import write_text
from flapsam.report.page import pages, report_page
from flapsam.report.run import read_run
from flapsam.report.scene import scene_of, scenes_of
from flapsam.report.serving import ViewServer
from flapsam.run.folder import RunFolder
from flapsam.run.observer import Observer


def view_server(
    path: Path,
    case: str | None,
    prediction: Path | None,
    truth: Path | None,
    uncertainty: Path | None,
    trained: Path | None,
    port: int,
    observer: Observer,
) -> tuple[ViewServer, str]:
    """Start a server for a run or an image.

    Args:
        path: a run's folder, or an image.
        case: the case of the run to open.
        prediction: the predicted label map of the image.
        truth: the true label map of the image.
        uncertainty: the image's uncertainty, as ``flapsam predict`` writes it.
        trained: a run or an adapter whose classes name the values of the image's label maps.
        port: the port to listen on; a free one if 0.
        observer: follows the work.

    Returns:
        The server, and the address to open.

    Raises:
        FlapsamError: as for ``run_server`` and ``image_server``, or an option does not apply to a run or to an image.
    """
    if RunFolder(path).is_begun:
        if prediction or truth or uncertainty or trained:
            raise FlapsamError(
                f"{path}: is a run with its own label maps; leave out --prediction, --truth, --uncertainty and --adapter"
            )
        return run_server(path, case, port, observer)
    if case:
        raise FlapsamError(f"{path}: there is no run here, so no case {case}; give a run's folder, or an image without CASE")
    label_maps = [(name, file) for name, file in (("prediction", prediction), ("truth", truth)) if file]
    return image_server(path, label_maps, trained, port, uncertainty)


@contextmanager
def opened(address: str) -> Iterator[None]:
    """Open an address in a browser while the block runs.

    The address is a secret, and every user of the machine can read the arguments of a browser's process. The browser is
    therefore given a file that only its user can read, and that leads to the address.

    Args:
        address: the address to open.
    """
    with tempfile.TemporaryDirectory(prefix="flapsam-") as folder:
        page = Path(folder) / "view.html"
        write_text(page, pages().get_template("redirect.html").render(address=address))
        webbrowser.open(page.as_uri())
        yield


def run_server(folder: Path, case: str | None, port: int, observer: Observer) -> tuple[ViewServer, str]:
    """Start a server for the cases of a run.

    Args:
        folder: the run's folder.
        case: ``CASE``, or ``SITE/CASE`` if several sites have a case with this name.
        port: the port to listen on; a free one if 0.
        observer: follows the work.

    Returns:
        The server, and the address to open: that of the case, or that of the report, which links to all cases.

    Raises:
        FlapsamError: there is no run, the case is unknown, or the server cannot listen.
    """
    run = read_run(folder)
    scenes = scenes_of(run)
    keys = [key for key in scenes if case in ("/".join(key), key[-1])]
    if case is not None and len(keys) != 1:
        known = ", ".join("/".join(key) for key in (keys or list(scenes))[:8])
        raise FlapsamError(f"{case}: {'several cases have this name' if keys else 'unknown case'}; choose from {known}")
    server = ViewServer(scenes, port=port)
    page = report_page(run, link=lambda *key: server.link(*key) if key in scenes else None, observer=observer)
    server.start_page = lambda: page
    return server, server.address.removesuffix(server.root) + server.link(*keys[0]) if case else server.address


def image_server(
    image: Path, label_maps: Sequence[tuple[str, Path]], trained: Path | None, port: int, uncertainty: Path | None = None
) -> tuple[ViewServer, str]:
    """Start a server for one image.

    Args:
        image: the image's file, or a folder with a DICOM series.
        label_maps: name and file of each label map.
        trained: a run or an adapter whose classes name the values of the label maps.
        port: the port to listen on; a free one if 0.
        uncertainty: file with the uncertainty of every voxel.

    Returns:
        The server, and the address to open.

    Raises:
        FlapsamError: a file is missing or broken, or the server cannot listen.
    """
    if not image.exists():
        raise FlapsamError(f"{image}: does not exist; give an image or a run's folder")
    classes = read_card(find_trained(trained).folder).classes if trained else []
    server = ViewServer({(image.name,): scene_of(image, label_maps, classes, uncertainty)}, port=port)
    return server, server.address.removesuffix(server.root) + server.link(image.name)

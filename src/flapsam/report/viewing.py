"""What ``flapsam view`` opens: a run with its report, or an image's file."""

from collections.abc import Sequence
from pathlib import Path

from flapsam.adapters.store import read_card
from flapsam.adapters.trained import find_trained
from flapsam.base.errors import FlapsamError
from flapsam.report.page import report_page
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
    trained: Path | None,
    port: int,
    observer: Observer,
) -> tuple[ViewServer, str]:
    """A server for a run or an image, and the address to open.

    Args:
        path: folder of a run, or an image.
        case: case of the run.
        prediction: label map of the image.
        truth: second label map of the image.
        trained: run or adapter that names the values of the image's label maps.
        port: a free one if 0.
        observer: follows the work.

    Raises:
        FlapsamError: as ``run_server`` and ``image_server``, or an argument belongs to the other of the two.
    """
    if RunFolder(path).is_begun:
        if prediction or truth or trained:
            raise FlapsamError(f"{path}: a run has its own label maps; leave out --prediction, --truth and --adapter")
        return run_server(path, case, port, observer)
    if case:
        raise FlapsamError(f"{path}: there is no run here, so no case {case}; give a run's folder, or an image alone")
    label_maps = [(name, file) for name, file in (("prediction", prediction), ("truth", truth)) if file]
    return image_server(path, label_maps, trained, port)


def run_server(folder: Path, case: str | None, port: int, observer: Observer) -> tuple[ViewServer, str]:
    """A server for the cases of a run, and the address to open: of a case, or of the report, which leads to all.

    Args:
        folder: of the run.
        case: ``CASE``, or ``SITE/CASE`` where several sites have one of that name.
        port: a free one if 0.
        observer: is told what happens.

    Raises:
        FlapsamError: there is no run, no such case, or the server cannot listen.
    """
    run = read_run(folder)
    scenes = scenes_of(run)
    keys = [key for key in scenes if case in ("/".join(key), key[-1])]
    if case is not None and len(keys) != 1:
        known = ", ".join("/".join(key) for key in (keys or list(scenes))[:8])
        raise FlapsamError(
            f"{case}: {'several cases have this name' if keys else 'there is no such case'}; choose from {known}"
        )
    server = ViewServer(scenes, port=port)
    page = report_page(run, link=lambda *key: server.link(*key) if key in scenes else None, observer=observer)
    server.start_page = lambda: page
    return server, server.address.removesuffix(server.root) + server.link(*keys[0]) if case else server.address


def image_server(
    image: Path, label_maps: Sequence[tuple[str, Path]], trained: Path | None, port: int
) -> tuple[ViewServer, str]:
    """A server for one image, and its address.

    Args:
        image: its file, or a folder with a DICOM series.
        label_maps: name and file of each.
        trained: a run or an adapter whose classes the label maps have.
        port: a free one if 0.

    Raises:
        FlapsamError: a file is missing or broken, or the server cannot listen.
    """
    if not image.exists():
        raise FlapsamError(f"{image}: there is no such image, and no run")
    classes = read_card(find_trained(trained).folder).classes if trained else []
    server = ViewServer({(image.name,): scene_of(image, label_maps, classes)}, port=port)
    return server, server.address.removesuffix(server.root) + server.link(image.name)

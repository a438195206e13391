"""What ``flapsam view`` opens: a run with its report, or an image's file."""

from collections.abc import Sequence
from pathlib import Path

from flapsam.adapter import read_card
from flapsam.errors import FlapsamError
from flapsam.federation.observer import Observer
from flapsam.report.page import report_page
from flapsam.report.run import read_run
from flapsam.report.scene import scene_of, scenes_of
from flapsam.report.serving import ViewServer
from flapsam.trained import find_trained


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

"""Take the documentation's screenshots from a run that `make demo` has made.

.venv/bin/python -m tests.helpers.screenshots demo/run docs/images
"""

import io
import sys
import threading
from pathlib import Path

from PIL import Image

from flapsam.report.page import write_report
from flapsam.report.viewing import run_server
from flapsam.run.observer import Observer
from tests.helpers.browser import open_browser, watch


def save(picture: bytes, path: Path) -> None:
    """Save charts as PNG with 256 colours, which keeps them small, and grey-scale images as JPEG."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    if path.suffix == ".png":
        image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    else:
        image.save(path, quality=88, optimize=True)


def main(run: Path, images: Path) -> None:
    images.mkdir(parents=True, exist_ok=True)
    report = write_report(run).resolve()
    server, address = run_server(run, None, 0, Observer())
    threading.Thread(target=server.run, daemon=True).start()
    with open_browser() as browser:
        for name, dark in (("report", False), ("report-dark", True)):
            page = watch(browser, width=1100, height=1010, dark=dark).page
            page.goto(report.as_uri())
            save(page.screenshot(), images / f"{name}.png")
        page = watch(browser, width=400, height=800).page
        page.goto(report.as_uri())
        save(page.screenshot(), images / "report-narrow.png")
        page = watch(browser, width=1100, height=900).page
        page.goto(report.as_uri())
        save(page.locator("#slices .strips section").nth(1).screenshot(), images / "slices.jpg")
        page = watch(browser, width=1100, height=820).page
        page.goto(address)
        page.locator(".strips section").nth(1).locator("a").first.click()
        page.wait_for_selector("body[data-state=shown]", timeout=60_000)
        page.locator("canvas").click(position={"x": 215, "y": 550})
        page.wait_for_timeout(500)
        save(page.screenshot(), images / "viewer.jpg")
    server.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

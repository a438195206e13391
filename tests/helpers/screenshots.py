"""The documentation's pictures, from a run that `make demo` has made.

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
    """Charts as a PNG of 256 colours, which is small; grey images as a JPEG."""
    shown = Image.open(io.BytesIO(picture)).convert("RGB")
    if path.suffix == ".png":
        shown.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    else:
        shown.save(path, quality=88, optimize=True)


def main(run: Path, images: Path) -> None:
    images.mkdir(parents=True, exist_ok=True)
    page = write_report(run).resolve()
    server, address = run_server(run, None, 0, Observer())
    threading.Thread(target=server.run, daemon=True).start()
    with open_browser() as browser:
        for name, dark in (("report", False), ("report-dark", True)):
            seen = watch(browser, width=1100, height=1010, dark=dark).page
            seen.goto(page.as_uri())
            save(seen.screenshot(), images / f"{name}.png")
        seen = watch(browser, width=400, height=800).page
        seen.goto(page.as_uri())
        save(seen.screenshot(), images / "report-narrow.png")
        seen = watch(browser, width=1100, height=900).page
        seen.goto(page.as_uri())
        save(seen.locator("#slices .strips section").nth(1).screenshot(), images / "slices.jpg")
        seen = watch(browser, width=1100, height=820).page
        seen.goto(address)
        seen.locator(".strips section").nth(1).locator("a").first.click()
        seen.wait_for_selector("body[data-state=shown]", timeout=60_000)
        seen.locator("canvas").click(position={"x": 215, "y": 550})
        seen.wait_for_timeout(500)
        save(seen.screenshot(), images / "viewer.jpg")
    server.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

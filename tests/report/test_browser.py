"""The report and the viewer in a real browser, as a person sees them."""

import io
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser

from flapsam.report.page import write_report
from flapsam.report.scene import nifti_of
from flapsam.report.serving import ViewServer
from flapsam.report.viewing import image_server, opened, run_server
from flapsam.run.observer import Observer
from flapsam.volumes import Volume, write_fractions
from tests.helpers.browser import needs_browser, open_browser, watch
from tests.helpers.command import flapsam
from tests.helpers.reports import make_run
from tests.helpers.sites import load
from tests.report.test_report import HOSTILE, TROUBLES

pytestmark = needs_browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@contextmanager
def serving(server: ViewServer) -> Iterator[ViewServer]:
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join()


def read_tables(page) -> dict[str, list[list[str]]]:
    """Id → rows of each table in the browser."""
    return page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('table')].map(t => "
        "[t.id, [...t.rows].map(r => [...r.cells].map(c => c.textContent))]))"
    )


@pytest.mark.parametrize("kind", ["demo-like", "drop-outs", "hostile"])
def test_the_report_opens_from_disk(kind: str, browser: Browser, tmp_path: Path):
    options = {
        "demo-like": {},
        "drop-outs": {"troubles": TROUBLES},
        "hostile": {"sites": (HOSTILE, "beta"), "case": HOSTILE, "notes": f"</p></style></script>{HOSTILE}"},
    }[kind]
    page = write_report(make_run(tmp_path, **options), tmp_path / "page.html")
    watched = watch(browser)
    watched.page.goto(page.as_uri())
    assert watched.complaints == []
    assert [url for url in watched.requests if not url.startswith("data:")] == [page.as_uri()]
    sections = {"gain", "cases", "dice-per-round", "traffic", "losses", "time"} | (
        {"attendance"} if kind == "drop-outs" else set()
    )
    for name in sections:
        chart = watched.page.locator(f"#{name} figure svg")
        assert chart.count() == 1, name
        box = chart.bounding_box()
        assert box and box["width"] > 300 and box["height"] > 60, name
    pictures = watched.page.locator("svg.strip image")
    assert pictures.count() == 2 * 3 * 5
    drawn = watched.page.evaluate(
        "async () => { const i = new Image(); i.src = document.querySelector('svg.strip image')"
        ".getAttribute('href'); await i.decode(); return i.naturalWidth; }"
    )
    assert drawn > 10
    tables = read_tables(watched.page)
    assert tables["gain-table"][-1] == [
        "all cases",
        "6",
        "0.760 (0.751 to 0.769)",
        "0.660 (0.651 to 0.669)",
        "+0.100 (+0.100 to +0.100)",
    ]
    if kind == "hostile":
        assert watched.page.evaluate("document.querySelectorAll('script, img').length") == 0
        assert HOSTILE in watched.page.inner_text("body")
        assert tables["gain-table"][1][0] == HOSTILE
    if kind == "drop-outs":
        assert len(tables["attendance-table"]) == 1 + len(TROUBLES)


@pytest.mark.parametrize(("width", "dark"), [(400, True), (1200, False)], ids=["narrow, dark", "wide, light"])
def test_the_report_is_usable_and_accessible(width: int, dark: bool, browser: Browser, tmp_path: Path):
    page = write_report(make_run(tmp_path, troubles=TROUBLES, notes="A trial."), tmp_path / "page.html")
    watched = watch(browser, width=width, dark=dark)
    watched.page.goto(page.as_uri())
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    watched.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    audit = Axe().run(watched.page, options={"resultTypes": ["violations", "passes"]})
    assert audit.violations_count == 0, audit.generate_report()
    # Axe did check the contrast.
    assert any(rule["id"] == "color-contrast" and len(rule["nodes"]) > 20 for rule in audit.response["passes"])
    background = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 24, 29)" if dark else "rgb(255, 255, 255)")


def test_truth_and_prediction_can_be_hidden(browser: Browser, tmp_path: Path):
    page = write_report(make_run(tmp_path), tmp_path / "page.html")
    watched = watch(browser)
    watched.page.goto(page.as_uri())
    lines = {kind: watched.page.locator(f"svg.strip path.{kind}").first for kind in ("truth", "prediction")}
    assert lines["truth"].is_visible() and lines["prediction"].is_visible()
    watched.page.get_by_label("truth").uncheck()
    assert not lines["truth"].is_visible() and lines["prediction"].is_visible()
    watched.page.get_by_label("prediction").uncheck()
    assert not lines["prediction"].is_visible()


def test_the_printed_report_has_a_few_pages(browser: Browser, tmp_path: Path):
    page = write_report(make_run(tmp_path), tmp_path / "page.html")
    watched = watch(browser, dark=True)
    watched.page.goto(page.as_uri())
    watched.page.emulate_media(media="print")
    watched.page.set_viewport_size({"width": 718, "height": 1000})
    # Nothing is cut off at the paper's edge, and the dark theme is not printed.
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= 718
    assert watched.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    printed = watched.page.pdf(format="A4")
    assert 2 <= printed.count(b"/Type /Page\n") + printed.count(b"/Type/Page/") <= 12


def test_a_click_in_the_served_report_opens_the_case(browser: Browser, tmp_path: Path):
    run = make_run(tmp_path, sites=("alpha", HOSTILE))
    server, address = run_server(run, None, 0, Observer())
    with serving(server):
        watched = watch(browser)
        watched.page.goto(address)
        watched.page.locator("#cases summary").click()
        watched.page.locator("#cases-table a").nth(1).click()
        watched.page.wait_for_selector("body[data-state=shown]", timeout=60_000)
        assert watched.page.inner_text("h1") == f"{HOSTILE}, case1"
        assert watched.page.get_by_role("link", name="next case").count() == 1
        watched.page.get_by_role("link", name="report").click()
        assert watched.page.locator("#gain-table").count() == 1
    assert watched.complaints == []
    assert all(url.startswith((server.address, "data:", "blob:")) for url in watched.requests)


def test_the_viewer_shows_volume_and_overlay(browser: Browser, tmp_path: Path):
    run = make_run(tmp_path)
    server, address = run_server(run, "alpha/case0", 0, Observer())
    with serving(server):
        watched = watch(browser, width=900, height=700)
        watched.page.goto(address)
        watched.page.wait_for_selector("body[data-state=shown]", timeout=60_000)
        watched.page.wait_for_timeout(300)
        with_overlay = picture(watched.page)
        # The picture is not uniform, and the classes are drawn over it in orange and sky blue.
        assert with_overlay.std() > 20
        orange, blue = share_of(with_overlay, (230, 159, 0)), share_of(with_overlay, (86, 180, 233))
        assert orange > 0.01
        assert blue > 0.001
        watched.page.locator("input[data-layer='1']").fill("0")
        watched.page.wait_for_timeout(300)
        without_overlay = picture(watched.page)
        assert share_of(without_overlay, (230, 159, 0)) == share_of(without_overlay, (86, 180, 233)) == 0
        assert without_overlay.std() > 20
        # The truth lies one voxel beside the prediction.
        watched.page.get_by_label("truth").fill("0.5")
        watched.page.wait_for_timeout(300)
        truth = picture(watched.page)
        assert share_of(truth, (230, 159, 0)) > 0.01
        assert np.abs(truth.astype(int) - with_overlay.astype(int)).max() > 50
        watched.page.locator("canvas").click(position={"x": 150, "y": 150})
        assert " mm · intensity " in watched.page.inner_text("#status")
    assert watched.complaints == []
    addresses = [url for url in watched.requests if not url.startswith(("data:", "blob:"))]
    assert all(url.startswith(server.address) for url in addresses)


def test_the_viewer_shows_an_image_and_its_label_map(browser: Browser, tmp_path: Path):
    make_run(tmp_path)
    site = tmp_path / "sites" / "alpha"
    image, labels = site / "images" / "case0.nii.gz", site / "labels" / "case0.nii.gz"
    half = np.full(load(image).shape, 128, np.uint8)
    write_fractions(half, image, load(image).affine, tmp_path / "half.nii.gz", "uncertainty")  # pyright: ignore
    server, address = image_server(image, [("prediction", labels)], None, 0, tmp_path / "half.nii.gz")
    with serving(server):
        watched = watch(browser)
        watched.page.goto(address)
        watched.page.wait_for_selector("body[data-state=shown]", timeout=60_000)
        assert watched.page.locator("header li").all_inner_texts() == ["value 1", "value 2"]
        box = watched.page.locator("canvas").bounding_box()
        assert box
        watched.page.locator("canvas").click(position={"x": 0.4 * box["width"], "y": 0.3 * box["height"]})
        assert "uncertainty: 0.50" in watched.page.inner_text("#status")
        # The map has colours of its own, which cover everything once it is faded in.
        slider = watched.page.locator("input[data-layer='2']")
        assert slider.input_value() == "0"
        slider.fill("1")
        watched.page.wait_for_timeout(300)
        assert share_of(picture(watched.page), (188, 55, 84)) > 0.05
        audit = Axe().run(watched.page)
        assert audit.violations_count == 0, audit.generate_report()


def test_the_browsers_arguments_do_not_reveal_the_viewers_address(browser: Browser, tmp_path: Path, monkeypatch):
    server, address = run_server(make_run(tmp_path), None, 0, Observer())
    arguments: list[str] = []
    monkeypatch.setattr("webbrowser.open", arguments.append)
    with serving(server), opened(address):
        (argument,) = arguments
        watched = watch(browser)
        watched.page.goto(argument)
        watched.page.wait_for_url(address)
        assert watched.page.locator("#gain-table").count() == 1
    assert server.token not in argument


def picture(page) -> np.ndarray:
    """The canvas as an array (row, column, RGB)."""
    return np.asarray(Image.open(io.BytesIO(page.locator("canvas").screenshot())).convert("RGB"))


def share_of(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    """The share of clearly coloured pixels whose hue is within 12 degrees of the given colour's."""
    degrees, strength = hue(pixels)
    target, _ = hue(np.array([[colour]]))
    distance = np.abs((degrees - target + 180) % 360 - 180)
    return float(((distance < 12) & (strength > 0.25)).mean())


def hue(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hue in degrees and saturation."""
    red, green, blue = np.moveaxis(pixels.astype(float) / 255, -1, 0)
    angle = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))
    highest, lowest = pixels.max(axis=-1), pixels.min(axis=-1)
    return angle, np.where(highest > 40, (highest - lowest) / np.maximum(highest, 1), 0)


class TestServer:
    """The viewer's server, without a browser."""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[ViewServer]:
        server, _ = run_server(make_run(tmp_path), None, 0, Observer())
        with serving(server):
            yield server

    def status(self, server: ViewServer, path: str, host: str | None = None) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{server.http.server_port}{path}")
        if host:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def test_only_requests_to_the_secret_address_are_answered(self, server: ViewServer):
        assert server.http.server_address[0] == "127.0.0.1"
        assert len(server.token) >= 32
        assert self.status(server, server.root) == 200
        assert self.status(server, server.root, host=f"localhost:{server.http.server_port}") == 200
        assert self.status(server, server.root, host="elsewhere.example") == 404
        for path in ("/", "/x/", f"/{server.token}x/", "/favicon.ico", f"/{server.token.swapcase()}/"):
            assert self.status(server, path) == 404

    def test_only_cases_and_the_viewer_are_served(self, server: ViewServer):
        assert self.status(server, server.link("alpha", "case0")) == 200
        assert self.status(server, server.link("alpha", "case0") + "2.nii") == 200
        paths = ("../../run.yaml", "case/alpha/", "case/alpha/case9/", "case/alpha/case0/9.nii", "case/alpha/case0/-1.nii")
        for path in (
            *paths,
            "%2e%2e/serving.py",
            "view.html",
            "case/alpha/case0/..%2f..%2frun.yaml",
            "case/alpha/case0/x.nii",
        ):
            assert self.status(server, server.root + path) == 404, path

    def test_volumes_are_served_in_their_own_orientation(self, server: ViewServer, tmp_path: Path):
        with urllib.request.urlopen(
            f"http://127.0.0.1:{server.http.server_port}{server.link('alpha', 'case1')}0.nii"
        ) as answer:
            served = nibabel.Nifti1Image.from_bytes(answer.read())
            assert answer.headers["Cache-Control"] == "no-store"
        original = load(tmp_path / "sites" / "alpha" / "images" / "case1.nii.gz")
        assert np.array_equal(served.get_fdata(), original.get_fdata())
        assert np.array_equal(np.asarray(served.affine), np.asarray(original.affine))

    def test_a_broken_volume_is_a_server_error(self, server: ViewServer, tmp_path: Path):
        (tmp_path / "sites" / "alpha" / "images" / "case1.nii.gz").write_bytes(b"")
        assert self.status(server, server.link("alpha", "case1") + "0.nii") == 500


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int32, (0, 7), np.uint8),
        (np.int32, (-1000, 3000), np.int16),
        (np.int16, (-1000, 3000), np.int16),
        (np.uint16, (0, 60000), np.uint16),
        (np.int32, (0, 100000), np.float32),
        (np.float64, (0.5, 1.5), np.float32),
    ],
)
def test_volumes_are_converted_to_types_that_the_viewer_draws(dtype: type, values: tuple[float, float], expected: type):
    array = np.array(values, dtype).reshape(2, 1, 1)
    image = nibabel.Nifti1Image.from_bytes(nifti_of(Volume(array, np.eye(4))))
    assert image.get_data_dtype() == expected
    assert image.get_fdata().ravel().tolist() == list(values)


@pytest.mark.parametrize(
    "wrong",
    [
        "no run",
        "a run's label maps",
        "a case of an image",
        "no such case",
        "several cases",
        "another shape",
        "no image",
        "port",
        "no label maps",
    ],
)
def test_what_cannot_be_viewed_is_reported_in_one_sentence(wrong: str, tmp_path: Path, capfd):
    run = make_run(tmp_path)
    image = tmp_path / "sites" / "alpha" / "images" / "case0.nii.gz"
    arguments: list[Path | str] = [run, "nothing"]
    if wrong == "no run":
        arguments = [tmp_path / "sites"]
    elif wrong == "a run's label maps":
        arguments = [run, "--truth", image]
    elif wrong == "a case of an image":
        arguments = [image, "case0"]
    elif wrong == "several cases":
        arguments = [run, "case0"]
    elif wrong == "another shape":
        nibabel.save(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.uint8), np.eye(4)), tmp_path / "small.nii.gz")
        arguments = [image, "--prediction", tmp_path / "small.nii.gz"]
    elif wrong == "no image":
        arguments = [tmp_path / "none.nii.gz"]
    elif wrong == "port":
        taken = ViewServer({})
        arguments = [image, "--port", str(taken.http.server_port)]
    elif wrong == "no label maps":
        (run / "predictions").rename(run / "elsewhere")
        arguments = [run]
    outcome = flapsam(capfd, "view", *arguments, "--no-browser")
    assert outcome.code == 2
    assert outcome.err.startswith("Error: ")
    assert outcome.err.count("\n") == 1

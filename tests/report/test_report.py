"""The report's page: its figures match the ledger, names are shown as plain text, and nothing external is loaded."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from nibabel import orientations

from flapsam.learning.metrics import CaseScores
from flapsam.report import page as report
from flapsam.report.comparison import write_comparison
from flapsam.report.figures.drawing import CHART_SITES, lowest
from flapsam.report.figures.strips import chosen_cases, draw_strip
from flapsam.report.page import write_report
from flapsam.run.config import Samples
from flapsam.volumes import Volume
from tests.helpers.command import flapsam
from tests.helpers.html_page import Page
from tests.helpers.reports import make_run

HOSTILE = "<img src=x onerror=alert(1)> \"&' $x_1$ <script>alert(2)"
TROUBLES = (
    {"event": "missing", "round": 2, "site": "beta", "reason": "it did not answer in 3600 s"},
    {"event": "refused", "round": 2, "site": "alpha", "reason": "its checksum is wrong", "bytes_up": 100},
    {"event": "excluded", "site": "gamma", "reason": "it runs another version of flapsam"},
)


def read(run: Path) -> Page:
    return Page(write_report(run).read_text())


def test_the_figures_match_the_ledger(tmp_path: Path):
    page = read(make_run(tmp_path))
    # The cases' Dice is 0.80, 0.81 and 0.82 for ball and 0.10 less for core, so a site's mean is 0.81 − 0.05. Local-only
    # training has 0.10 less.
    assert page.tables["gain-table"] == [
        ["site", "cases", "federated", "local-only", "federated − local-only"],
        ["alpha", "3", "0.760 (0.735 to 0.785)", "0.660 (0.635 to 0.685)", "+0.100 (+0.100 to +0.100)"],
        ["beta", "3", "0.760 (0.735 to 0.785)", "0.660 (0.635 to 0.685)", "+0.100 (+0.100 to +0.100)"],
        ["all cases", "6", "0.760 (0.751 to 0.769)", "0.660 (0.651 to 0.669)", "+0.100 (+0.100 to +0.100)"],
    ]
    # t(2) · 0.01 / √3 = 4.303 · 0.00577 = 0.025 for three cases, and t(5) · 0.00894 / √6 = 0.009 for six.
    cases = page.tables["cases-table"]
    assert len(cases) == 1 + 6
    assert cases[2] == ["alpha", "case1", "0.810", "0.710", "1.5", "–", "0.710", "0.610", "1.5", "–"]
    assert page.tables["dice-per-round-federated"][1:] == [["2", "0.600", "0.700", "0.650"]]
    assert page.tables["losses-federated"][1:] == [["1", "1.000", "1.100", "1.050"], ["2", "0.500", "0.600", "0.550"]]
    # Each site sends 2 KiB and 4 KiB, and receives 1 KiB in each round and 0.5 KiB at the end: 8.5 KiB.
    assert page.tables["traffic-rounds"][1:] == [
        ["1", "2.00 KiB", "1.00 KiB", "6.00 KiB"],
        ["2", "4.00 KiB", "1.00 KiB", "10.00 KiB"],
        ["final model", "–", "512 B", "1.00 KiB"],
    ]
    totals = {row[0]: row for row in page.tables["traffic-table"][1:]}
    assert totals["this run, measured"][3] == "8.50 KiB"
    assert totals["flap"][1] == "FLAP-SAM"
    # Each of the two rounds takes 5 s, with two fits of 2 s and 0.25 s of aggregation.
    federated = page.tables["time-table"][1]
    assert federated[:4] == ["federated", "8.0", "0.5", "1.5"]
    assert page.tables["time-sites"][1] == ["federated", "alpha", "4.0", "1.0", "12", "3.00"]
    assert page.tables["sites-table"][1:] == [["alpha", "4", "1", "3"], ["beta", "4", "1", "3"]]
    assert "flapsam simulate 'a run.yaml'" in page.text
    assert "Every site answered every round" in page.text


def test_parallel_fits_take_as_long_as_the_slowest(tmp_path: Path):
    run = make_run(tmp_path)
    ledger = run / "events.jsonl"
    events = [json.loads(line) for line in ledger.read_text().splitlines()]
    for event in events:
        if event["event"] == "fit" and event["federation"] == "federated":
            event |= {"site_seconds": 2.1, "seconds": 2.0 if event["site"] == "alpha" else 1.0}
    ledger.write_text("".join(json.dumps(event) + "\n" for event in events))
    # Each of the two rounds takes 5 s, with 2 s of fitting and 0.25 s of aggregation.
    assert read(run).tables["time-table"][1][:4] == ["federated", "4.0", "0.5", "5.5"]


def test_sites_that_do_not_share_their_metrics_are_counted(tmp_path: Path):
    run = make_run(tmp_path, modes=("federated",), troubles=TROUBLES)
    ledger = run / "events.jsonl"
    events = [json.loads(line) for line in ledger.read_text().splitlines()]
    for event in events:
        if event["event"] == "fit":
            event |= dict.fromkeys(("loss", "cross_entropy", "dice_loss", "steps", "seconds", "waiting"))
            event["site_seconds"] = 2.2
    kept = [event for event in events if event["event"] not in ("validation", "test")]
    ledger.write_text("".join(json.dumps(event) + "\n" for event in kept))
    page = read(run)
    # Two fits of 3 KiB, and a delivery of 512 B to each site. In round 2, a packet of 100 B is refused and beta is missing.
    assert "3.55 KiB" in page.text
    assert page.tables["time-table"][1][1] == "2.2"
    assert not {"losses-federated", "dice-per-round-federated"} & page.tables.keys()


def test_drop_outs_are_shown_with_their_reasons(tmp_path: Path):
    page = read(make_run(tmp_path, troubles=TROUBLES))
    shown = {(row[0], row[1], row[3], row[4]) for row in page.tables["attendance-table"][1:]}
    assert shown == {
        ("no answer", "beta", "it did not answer in 3600 s", "2"),
        ("packet refused", "alpha", "its checksum is wrong", "2"),
        ("does not take part", "gamma", "it runs another version of flapsam", "–"),
    }
    # A refused packet counts as traffic.
    assert page.tables["traffic-rounds"][2][1] == "100 B"


def test_names_are_shown_as_plain_text(tmp_path: Path):
    trouble = {"event": "missing", "round": 2, "site": HOSTILE, "reason": f"</td></style></script>{HOSTILE}"}
    run = make_run(
        tmp_path, sites=(HOSTILE, "beta"), case=HOSTILE, notes=f"</p>{HOSTILE}\n", name=HOSTILE, troubles=[trouble]
    )
    page = read(run)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.tables["cases-table"][1][:2] == [HOSTILE, f"{HOSTILE}0"]
    assert page.tables["attendance-table"][1][3] == trouble["reason"]
    assert f"</p>{HOSTILE}" in page.text
    assert not any(address.startswith("x") for address in page.addresses)


def test_the_page_refers_to_nothing_external(tmp_path: Path):
    page = read(make_run(tmp_path))
    assert page.addresses
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert {"script", "link", "iframe", "object"} & set(page.tags) == {"link"}


def test_every_chart_has_a_description_and_a_table(tmp_path: Path):
    html = write_report(make_run(tmp_path, troubles=TROUBLES)).read_text()
    sections = re.findall(r'<section id="(.*?)".*?>(.*?)</section>', html, re.DOTALL)
    drawn = {name: body for name, body in sections if "<figure><div" in body}
    assert set(drawn) == {"gain", "cases", "dice-per-round", "traffic", "losses", "time", "attendance"}
    for body in drawn.values():
        assert re.search(r'<svg[^>]* role="img" aria-label="[^"]{20,}"', body)
        assert "<table" in body
    strips = re.findall(r'<svg class="strip"[^>]* aria-label="([^"]+)"', html)
    assert strips[0] == "best case of alpha: case2, Dice ball 0.820 (1.5 mm); core 0.720"
    assert [text.split()[0] for text in strips] == ["best", "median", "worst"] * 2


def test_the_same_run_gives_the_same_bytes(tmp_path: Path):
    run = make_run(tmp_path)
    assert write_report(run).read_bytes() == write_report(run, tmp_path / "again.html").read_bytes()


def test_ids_are_unique(tmp_path: Path):
    html = write_report(make_run(tmp_path, troubles=TROUBLES)).read_text()
    ids = re.findall(r'[ "]id="([^"]+)"', html)
    assert len(ids) > 20
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("state", ["begun", "first round", "not over", "no data", "no test", "one site"])
def test_a_run_in_any_state_has_a_report(state: str, tmp_path: Path):
    run = make_run(tmp_path, over=False, sites=("alpha",) if state == "one site" else ("alpha", "beta"))
    ledger = run / "events.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    kept = {"begun": 0, "first round": 4}.get(state, len(lines))
    if state == "no test":
        lines = [line for line in lines if json.loads(line)["event"] != "test"]
    ledger.write_text("".join(lines[:kept]) + '{"event": "fi')
    if state == "no data":
        (tmp_path / "sites").rename(tmp_path / "moved")
    page = read(run)
    assert "This run is not finished" in page.text
    assert ("gain-table" in page.tables) == (state in ("not over", "no data", "one site"))
    assert ("cannot be shown" in page.text) == (state == "no data")


def test_images_can_be_left_out(tmp_path: Path, capfd):
    run = make_run(tmp_path)
    assert flapsam(capfd, "report", run, "--no-images", "-o", tmp_path / "plain.html").code == 0
    assert "image/jpeg" not in (tmp_path / "plain.html").read_text()
    outcome = flapsam(capfd, "report", run)
    assert outcome.out == f"Wrote the report to {run / 'report' / 'index.html'}\n"
    assert "image/jpeg" in (run / "report" / "index.html").read_text()


def test_the_best_median_and_worst_cases_are_chosen():
    def scored(site: str, case: str, *dices: float | None) -> CaseScores:
        return CaseScores(case, site, dict(zip("ab", dices, strict=True)), dict.fromkeys("ab"))

    scores = [scored("x", str(i), dice, 0.5) for i, dice in enumerate((0.1, 0.9, 0.5, 0.7, 0.3))]
    scores += [
        scored("y", "only", 0.5, None),
        scored("y", "unknown", None, None),
        scored("w", "1", 1, 1),
        scored("w", "2", 0, 0),
    ]
    chosen = [(score.site, rank, score.case) for rank, score in chosen_cases(scores)]
    assert chosen == [
        ("w", "best", "1"),
        ("w", "median", "2"),
        ("x", "best", "1"),
        ("x", "median", "2"),
        ("x", "worst", "0"),
        ("y", "best", "only"),
    ]


def test_slices_look_the_same_in_every_orientation():
    truth = np.zeros((30, 36, 8), np.uint8)
    truth[22:26, 8:14, 2:7] = 1
    image = np.random.default_rng(0).normal(0, 1, truth.shape).astype(np.float32) + truth * 5
    affine = np.diag([1.0, 0.8, 4.0, 1.0])
    strips = set()
    for axes in ((0, 1, 2), (2, 0, 1), (1, 2, 0), (1, 0, 2)):
        for flips in ((1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)):
            orientation = np.array(list(zip(axes, flips, strict=True)))
            turned_affine = affine @ orientations.inv_ornt_aff(orientation, truth.shape)
            turned_image, turned_truth = (
                Volume(orientations.apply_orientation(array, orientation), turned_affine) for array in (image, truth)
            )
            strips.add(draw_strip(turned_image, turned_truth, turned_truth, Samples(), "a case"))
    assert len(strips) == 1


def test_the_patients_right_is_on_the_left_and_anterior_is_up():
    # In RAS+, x grows to the patient's right and y to the front. The slices are shown whole.
    truth = np.zeros((20, 20, 4), np.uint8)
    truth[2:5, 2:18, :] = 1
    truth[12:18, 15:17, :] = 2
    volume, empty = Volume(truth, np.eye(4)), Volume(np.zeros_like(truth), np.eye(4))
    drawn = draw_strip(volume, volume, empty, Samples(axis="axial"), "a case")
    paths = re.findall(r'class="truth" style="[^"]*" d="([^"]+)"', drawn)[:2]
    first, second = ([[float(n) for n in pair.split()] for pair in re.findall(r"[\d.]+ [\d.]+", path)] for path in paths)
    # Class 1 (x 2–4) lies on the patient's left, so on the right of the picture. Class 2 (x 12–17, y 15–16) is anterior.
    assert min(x for x, _ in first) > max(x for x, _ in second)
    assert max(y for _, y in second) < np.mean([y for _, y in first])


def test_runs_are_compared_case_by_case(tmp_path: Path, capfd):
    first = make_run(tmp_path, name="first", fields={"seed": 1})
    second = make_run(tmp_path, name="second", better=0.05, fields={"seed": 2, "lora": {"rank": 4}})
    outcome = flapsam(capfd, "report", first, second, "-o", tmp_path / "both.html")
    assert outcome.code == 0, outcome.err
    page = Page((tmp_path / "both.html").read_text())
    assert page.tables["differences-table"][1:] == [
        ["first", "mean", "6", "0.760", "6", "–"],
        ["first", "ball", "6", "0.810", "6", "–"],
        ["first", "core", "6", "0.710", "6", "–"],
        ["second", "mean", "6", "0.810", "6", "+0.050 (+0.050 to +0.050)"],
        ["second", "ball", "6", "0.860", "6", "+0.050 (+0.050 to +0.050)"],
        ["second", "core", "6", "0.760", "6", "+0.050 (+0.050 to +0.050)"],
    ]
    assert page.tables["fields-table"] == [["field", "first", "second"], ["seed", "1", "2"], ["lora.rank", "32", "4"]]
    assert page.tables["dice-per-round-table"][1:] == [["2", "0.650", "0.650"]]
    assert [row[2] for row in page.tables["traffic-table"][1:]] == ["8.50 KiB", "8.50 KiB"]


def test_runs_of_the_same_name_are_distinguished(tmp_path: Path):
    runs = [make_run(tmp_path / part) for part in ("a", "b")]
    page = Page(write_comparison(runs, tmp_path / "both.html").read_text())
    assert page.tables["runs-table"][0][0] == "run"
    assert [row[0] for row in page.tables["runs-table"][1:]] == [str(run) for run in runs]


@pytest.mark.parametrize(
    "wrong", ["no run", "damaged identity", "damaged ledger", "twice", "no common mode", "a file in the way"]
)
def test_errors_are_reported_in_one_sentence(wrong: str, tmp_path: Path, capfd):
    run = make_run(tmp_path, modes=("federated",))
    arguments: list[Path | str] = [run]
    if wrong == "no run":
        arguments = [tmp_path]
    elif wrong == "damaged identity":
        (run / "environment.json").write_text("{")
    elif wrong == "damaged ledger":
        (run / "events.jsonl").write_text("{\n")
    elif wrong == "twice":
        arguments = [run, run]
    elif wrong == "no common mode":
        arguments = [run, make_run(tmp_path, name="other", modes=("local",))]
    else:
        (run / "report").write_text("")
    outcome = flapsam(capfd, "report", *arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("Error: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.err


def test_colours_have_enough_contrast():
    """WCAG 2.1: a contrast of at least 4.5 to 1 for text and 3 to 1 for graphics, in both themes."""
    style = (Path(report.__file__).parent / "templates" / "page.css").read_text()
    themes = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(themes) == 2
    for theme in themes:
        for name, colour in theme.items():
            if name in ("paper", "raised", "grid", "line"):
                continue
            minimum = 3 if name.startswith("series") else 4.5
            for background in ("paper", "raised"):
                assert contrast(colour, theme[background]) >= minimum, (name, background)


def contrast(first: str, second: str) -> float:
    bright, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_charts_of_many_sites_show_those_that_need_attention_and_say_so():
    values = {f"site_{index:03}": index / 100 for index in range(100)} | {"unscored": None}
    sites, text = lowest(values, "the lowest Dice")
    assert sites == [f"site_{index:03}" for index in range(CHART_SITES)]
    assert text == f" The chart shows {CHART_SITES} of 101 sites, those with the lowest Dice."
    assert lowest({"b": 0.5, "a": None}, "the lowest Dice") == (["a", "b"], "")

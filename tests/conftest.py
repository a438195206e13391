import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from flapsam.learning.prepared import PreparedCase, prepare
from flapsam.run.config import Data, Samples
from flapsam.sam import ARCHITECTURES
from flapsam.sam.sources import SOURCES
from flapsam.sites import folders, label_map
from tests.helpers.families import SMALL, SMALL_SOURCES
from tests.helpers.sites import make_site


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Several test processes run at the same time, and their threads would compete for the cores.
    torch.set_num_threads(1)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the reports of simulations, whose figures take longer than small runs."""
    monkeypatch.setattr("flapsam.report.page.write_report", lambda folder, **options: folder / "report" / "index.html")


@pytest.fixture(scope="module")
def small_families() -> Iterator[None]:
    """Let configurations name a small member of every family of backbones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, sizes in SMALL.items():
            patch.setitem(ARCHITECTURES, name, sizes)
            patch.setitem(SOURCES, name, SMALL_SOURCES[name])
        yield


@pytest.fixture
def cases(tmp_path: Path) -> list[PreparedCase]:
    """Three prepared cases of six slices each."""
    make_site(tmp_path / "a", 3)
    mapping = label_map(Data(path=tmp_path, labels={"ball": 1, "core": 2}), "a")
    return [prepare(case, mapping, Samples(), tmp_path / "cache") for case in folders.read(tmp_path).cases]

"""A site that is asked to take part: what it contributes, what it refuses, and what it keeps to itself."""

import json
from collections.abc import Iterator
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from flapsam import __version__
from flapsam.base.errors import FlapsamError
from flapsam.federation.agreement import SERVER
from flapsam.federation.engines.fit_process import FitProcess
from flapsam.federation.engines.nvflare.controller import is_due
from flapsam.federation.engines.nvflare.jobs import AdminLine, Job, RunFollower, with_names
from flapsam.federation.going_back import go_back
from flapsam.federation.hospitals.handshake import (
    GONE,
    REASONS,
    Presence,
    Proposal,
    SiteFailed,
    agreed_modalities,
    read_message,
)
from flapsam.federation.hospitals.server_side import ServerSide
from flapsam.federation.hospitals.site_config import SiteConfig, read_site_config
from flapsam.federation.hospitals.site_side import SiteSide
from flapsam.federation.packets import Header, decode, encode
from flapsam.federation.preparation import resolve
from flapsam.federation.rounds import Answer, Work
from flapsam.federation.server import UNKNOWN
from flapsam.federation.shares import TrainingSize, bounded
from flapsam.federation.state import ClientState
from flapsam.run.config import Rounds, RunConfig
from flapsam.run.folder import RunFolder
from flapsam.run.ledger import TOGETHER, AnswerMissing, Delivered, JobStarted
from flapsam.run.observer import Observer
from flapsam.run.reading import changed, fingerprint, read_config
from tests.helpers.ledgers import read_events
from tests.helpers.sites import make_sites, write_run

RUN = "0" * 32
SMALL = {"min_steps": 1}
"""Bounds for the tests' few slices."""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return resolve(read_config(write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data", cases=5))))


def site_config(folder: Path, **fields: object) -> SiteConfig:
    tree = {"data": {"path": folder / "data" / "site_0"}, "state": folder / "state", "threads": 1, "bounds": SMALL, **fields}
    return SiteConfig.model_validate(tree)


def propose(config: RunConfig, **changes: object) -> bytes:
    proposal = Proposal.of(RUN, config)
    return proposal.model_copy(update={"config": {**proposal.config, **changes}}).model_dump_json().encode()


def refusal(file: SiteConfig, message: bytes) -> str:
    with pytest.raises(SiteFailed) as failure:
        SiteSide("site_0", file).join(message)
    return str(failure.value)


def test_a_proposal_does_not_contain_the_servers_paths(config: RunConfig, tmp_path: Path):
    assert str(tmp_path) not in propose(config).decode()


def test_a_server_admits_a_sites_presence(config: RunConfig, tmp_path: Path):
    """Three of five cases are for training, one for validation, one for testing. Validation slices count for the weight. All
    counts are rounded to multiples of 5."""
    presence = read_message(Presence, SiteSide("site_0", site_config(tmp_path)).join(propose(config)))
    assert presence.cases == {"train": 5, "val": 5, "test": 5}
    assert (presence.training_cases, presence.training_slices, presence.modalities, presence.held) == (5, 25, 1, 0)
    RunFolder(config.output).begin(config)
    server = ServerSide(config.output)
    for site in ("site_0", "site_1"):
        server.admit(site, presence.model_dump_json().encode())
    server.open()
    assert server.held == {"site_0": 0, "site_1": 0}


@pytest.mark.parametrize(
    ("own", "code"),
    [
        ({"strategies": ["full"]}, "strategy"),
        ({"aggregators": ["fedavg"]}, "aggregator"),
        ({"max_rounds": 1}, "rounds"),
        ({"min_cases": 5}, "cases"),
        ({"data": {"path": "nowhere"}}, "data"),
    ],
)
def test_a_site_obeys_its_own_file(own: dict, code: str, config: RunConfig, tmp_path: Path):
    assert refusal(site_config(tmp_path, **own), propose(config)) == code


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"", "version"),
        (b"{}", "version"),
        (b'{"version": "9.9.9"}', "version"),
        (b'{"version": "VERSION", "run": "../../etc", "config": {}}', "configuration"),
        (b'{"version": "VERSION", "run": "00000000000000000000000000000000", "config": {}}', "configuration"),
        (b'{"version": "VERSION"' + b"[" * 100_000, "configuration"),
    ],
)
def test_an_invalid_proposal_is_refused(message: bytes, code: str, tmp_path: Path):
    assert refusal(site_config(tmp_path), message.replace(b"VERSION", __version__.encode())) == code


def test_a_run_with_unknown_names_is_refused(config: RunConfig, tmp_path: Path):
    assert refusal(site_config(tmp_path), propose(config, strategy="everything")) == "configuration"
    assert refusal(site_config(tmp_path), propose(config, backbone={"name": "sam-vit-z"})) == "backbone"
    assert refusal(site_config(tmp_path), propose(config, data=[])) == "configuration"


def test_a_site_ignores_the_servers_paths(config: RunConfig, tmp_path: Path):
    """A server that names files of the site does not get their contents."""
    data = {**Proposal.of(RUN, config).config["data"], "path": "/", "table": "/etc/passwd"}
    backbone = {"name": "sam-tiny", "weights": "/etc/passwd"}
    participant = SiteSide("site_0", site_config(tmp_path))
    participant.join(propose(config, data=data, backbone=backbone, output="/elsewhere", device="cuda", threads=64))
    merged = participant.config
    assert (merged.data.path, merged.data.table) == (tmp_path / "data" / "site_0", None)
    assert (merged.backbone.weights, merged.output, merged.device, merged.threads) == (None, tmp_path / "state", "cpu", 1)


def test_private_metrics_do_not_leave_the_site(config: RunConfig, tmp_path: Path):
    for metrics in (True, False):
        participant = SiteSide("site_0", site_config(tmp_path, metrics=metrics, state=tmp_path / str(metrics)))
        participant.join(propose(config))
        agreement = participant.client.agreement
        start_header = Header(run=RUN, round=0, base=0, sender=SERVER)
        start = encode(start_header, agreement.nothing(agreement.rank("site_0")), {})
        reply = participant.fit(iter([start]))
        contract = agreement.up("site_0", 1)
        header, _ = decode(reply, lambda header, contract=contract: contract, contract.tensor_bytes)
        assert bool(header.metrics) == metrics
        assert bool(json.loads(participant.validate(iter([start])))) == metrics


def test_a_process_reports_codes_and_writes_the_details_to_its_own_log(config: RunConfig, tmp_path: Path):
    path = tmp_path / "site.yaml"
    path.write_text(f"data: {{path: {tmp_path}/secret-place}}\n")
    process = FitProcess("site_0", path)
    try:
        with pytest.raises(SiteFailed, match=r"^data$"):
            process.join(propose(config))
        with pytest.raises(SiteFailed, match=r"^error$"):
            process.ask("fit", [memoryview(b"no packet")])
    finally:
        process.stop()
    assert "secret-place" in (tmp_path / "state" / "site.log").read_text()
    assert not any("secret" in sentence for sentence in REASONS.values())


def test_paths_in_a_site_file_are_relative_to_it_and_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kit").mkdir()
    monkeypatch.chdir(tmp_path)
    for text, state in (
        ("", "state"),
        ("state: state\n", "state"),
        ("state: ../other\n", "../other"),
        ("state: /var/x\n", "/var/x"),
    ):
        Path("kit/site.yaml").write_text(f"data: {{path: data}}\n{text}")
        file = read_site_config(Path("kit/site.yaml"))
        assert file.data.path == tmp_path / "kit" / "data"
        assert file.state.resolve() == (tmp_path / "kit" / state).resolve() and file.state.is_absolute()


def test_a_typo_in_a_site_file_is_named_in_the_error(tmp_path: Path):
    (tmp_path / "site.yaml").write_text("data: {path: x}\nmin_case: 3\n")
    with pytest.raises(FlapsamError, match=r"site\.yaml: unknown key 'min_case'"):
        read_site_config(tmp_path / "site.yaml")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "9.9"}, f"it runs flapsam 9.9, the server runs {__version__}"),
        ({"backbone": "f" * 64}, "its backbone differs: checksum ffffffffffff…"),
        ({"contract": "f" * 64}, "its initial tensors differ from the server's"),
        ({"modalities": 2}, "its images have 2 modalities, most sites' have 1"),
        ({"cases": {"all": 3}}, "the presence message is invalid"),
        ({"cases": {"train": 3, "val": 1}}, "the presence message is invalid"),
        ({"cases": {"train": "3", "val": 1, "test": 1}}, "the presence message is invalid"),
        ({"modalities": True}, "the presence message is invalid"),
        ({"training_cases": 10**8}, "the presence message is invalid"),
        ({"training_slices": 0}, "the presence message is invalid"),
        ({"held": -1}, "the presence message is invalid"),
        ({"note": "x"}, "the presence message is invalid"),
    ],
)
def test_a_server_excludes_a_site_that_differs_and_says_why(change: dict, reason: str, config: RunConfig, tmp_path: Path):
    RunFolder(config.output).begin(config)
    server = ServerSide(config.output)
    valid = {
        "version": __version__,
        "contract": server.agreement.contract.hash,
        "backbone": server.origin.checksum,
        "modalities": 1,
        "cases": {"train": 3, "val": 1, "test": 1},
        "training_cases": 4,
        "training_slices": 24,
        "held": 0,
    }
    server.admit("site_0", json.dumps(valid).encode())
    server.admit("site_1", json.dumps({**valid, **change}).encode())
    # Only a site's first presence message counts, so its weight cannot grow later.
    server.admit("site_0", json.dumps({**valid, "training_slices": 10**9}).encode())
    with pytest.raises(FlapsamError, match=r"too few sites take part: 1 of at least 2 \(rounds\.min_sites\)"):
        server.open()
    assert list(server.held) == ["site_0"]
    (excluded,) = read_events(config.output, "excluded")
    assert excluded["site"] == "site_1" and reason in excluded["reason"]
    assert server.known["site_0"].slices == 24


def requiring(config: RunConfig, require: object) -> RunConfig:
    return changed(config, {"rounds.require": require})


def test_a_server_does_not_begin_without_a_site_that_is_required(config: RunConfig, tmp_path: Path):
    config = requiring(config, ["site_0", "site_1", "site_2"])
    RunFolder(config.output).begin(config)
    valid = SiteSide("site_0", site_config(tmp_path)).join(propose(config))
    server = ServerSide(config.output)
    for site in ("site_0", "site_1"):
        server.admit(site, valid)
    server.exclude("site_2", "data")
    with pytest.raises(FlapsamError, match=r"site_2 is required \(rounds\.require\) and does not take part: its data or"):
        server.open()
    server._lock.close()
    # The coordinator decides to continue without it. Nothing else of the run may change.
    folder = RunFolder(config.output)
    fewer = requiring(config, ["site_0", "site_1"])
    with pytest.raises(FlapsamError, match="another configuration"):
        folder.resume(changed(fewer, {"rounds.count": 9}))
    assert folder.read_config().rounds.named == ["site_0", "site_1", "site_2"]
    assert folder.resume(fewer) == folder.read_environment()["run"]
    server = ServerSide(config.output)
    for site in ("site_0", "site_1"):
        server.admit(site, valid)
    server.open()
    assert sorted(server.held) == ["site_0", "site_1"]


def test_sites_are_not_told_whom_the_run_waits_for(config: RunConfig):
    """So a site's own record of what it agreed to does not change with it."""
    assert propose(requiring(config, ["site_1"])) == propose(config) == propose(requiring(config, 2))
    # Nor does a finished cell of a bench count for another run.
    bare = RunConfig(data=config.data)
    assert fingerprint(requiring(config, 2)) == fingerprint(config) and fingerprint(requiring(bare, 2)) == fingerprint(bare)


def test_a_required_site_has_all_the_time_it_needs_and_others_three_times_their_longest_fit(
    config: RunConfig, tmp_path: Path
):
    config = changed(requiring(config, ["site_0"]), {"rounds.deadline": 100})
    RunFolder(config.output).begin(config)
    valid = read_message(Presence, SiteSide("site_0", site_config(tmp_path)).join(propose(config)))
    server = ServerSide(config.output)
    server.admit("site_0", valid.model_dump_json().encode())
    server.admit("site_1", valid.model_copy(update={"training_cases": 15}).model_dump_json().encode())
    server.open()
    assert (server.patience("site_0"), server.patience("site_1")) == (inf, 100)
    server.await_answer("fit", "site_0", 12.34, inf)
    server.await_answer("fit", "site_1", 50, 50)
    for seconds in (50.0, 40.0):
        server.took("site_1", seconds)
    assert server.patience("site_1") == 150
    first, second = read_events(config.output, "awaited")
    assert (first["round"], first["site"], first["seconds"], first["left"], first["share"]) == (
        1,
        "site_0",
        12.3,
        None,
        0.25,
    )
    assert (second["left"], second["share"]) == (50, 0.75)


@pytest.mark.parametrize(
    ("require", "sites", "named", "enough"),
    [
        ("all", None, ["a", "b", "c"], 2),
        ("all", ["c", "a"], ["a", "c"], 2),
        (["b"], None, ["b"], 2),
        (3, None, [], 3),
        (1, None, [], 2),
    ],
)
def test_all_means_the_sites_of_the_run(require: object, sites: list | None, named: list, enough: int, config: RunConfig):
    found = with_names(changed(requiring(config, require), {"data.sites": sites}), ["b", "a", "c"])
    assert (found.rounds.named, found.rounds.enough) == (named, enough)


@pytest.mark.parametrize(
    ("require", "problem"),
    [(["a", "x"], "rounds.require: x is not a site of this run; its sites are a, b, c"), (4, "4 sites are required, and")],
)
def test_a_run_cannot_require_sites_that_it_does_not_have(require: object, problem: str, config: RunConfig):
    with pytest.raises(FlapsamError, match=problem):
        with_names(requiring(config, require), ["a", "b", "c"])


@pytest.mark.parametrize(
    ("counts", "configured", "agreed"),
    [((3, 1, 1), 1, 1), ((1, 3, 3), 1, 3), ((2, 1), 1, 1), ((2, 1), 2, 2), ((2, 3), 1, 2), ((), 2, 2)],
)
def test_most_sites_decide_about_modalities_whoever_answers_first(counts: tuple, configured: int, agreed: int):
    assert agreed_modalities(counts, configured) == agreed_modalities(counts[::-1], configured) == agreed


def test_the_first_site_to_answer_decides_nothing_and_a_false_count_counts_in_part(config: RunConfig, tmp_path: Path):
    """24 slices at two sites count as 25, so at most 50 of the third count. The shares are 25, 25 and 50 of 100."""
    RunFolder(config.output).begin(config)
    valid = read_message(Presence, SiteSide("site_0", site_config(tmp_path)).join(propose(config)))
    server = ServerSide(config.output)
    server.admit("liar", valid.model_copy(update={"modalities": 3}).model_dump_json().encode())
    for site in ("site_0", "site_1"):
        server.admit(site, valid.model_dump_json().encode())
    server.admit("boaster", valid.model_copy(update={"training_slices": 10**10}).model_dump_json().encode())
    server.open()
    assert server.held == {"boaster": 0, "site_0": 0, "site_1": 0}
    assert [event["site"] for event in read_events(config.output, "excluded")] == ["liar"]
    assert server.server.shares == pytest.approx({"boaster": 0.5, "site_0": 0.25, "site_1": 0.25})
    (bound,) = read_events(config.output, "bounded")
    assert (bound["site"], bound["claimed"], bound["counted"]) == ("boaster", 10**10, 50)


@pytest.mark.parametrize(
    ("slices", "counted"),
    [
        ([100, 600], [100, 600]),
        ([100, 1001], [100, 1000]),
        ([100, 200, 300], [100, 200, 300]),
        ([100, 301, 200], [100, 300, 200]),
        ([100] * 11 + [5000], [100] * 11 + [1000]),
    ],
)
def test_a_site_counts_for_at_most_ten_medians_and_at_most_all_others(slices: list[int], counted: list[int]):
    sizes = {str(number): TrainingSize(slices=count, cases=1) for number, count in enumerate(slices)}
    assert [size.slices for size in bounded(sizes, Rounds()).values()] == counted
    assert bounded(sizes, Rounds(max_weight=None)) == bounded(sizes, Rounds(weights="cases")) == sizes


def test_configured_weights_are_normalised_over_the_sites_that_take_part(config: RunConfig, tmp_path: Path):
    options = config.rounds.model_copy(update={"weights": {"site_0": 3.0, "site_1": 1.0, "late": 5.0}})
    config = config.model_copy(update={"rounds": options})
    RunFolder(config.output).begin(config)
    server = ServerSide(config.output)
    for site in ("site_0", "site_1"):
        file = site_config(tmp_path, data={"path": tmp_path / "data" / site}, state=tmp_path / site)
        server.admit(site, SiteSide(site, file).join(propose(config)))
    server.open()
    assert server.server.shares == {"site_0": 0.75, "site_1": 0.25}


def test_a_run_goes_back_and_an_absent_site_is_not_left_with_a_dropped_result(tmp_path: Path):
    """site_2 was away when round 2 was repeated. It still holds the first result of round 2, and gets the new one."""
    fields = {"rounds": {"count": 2, "keep": 1}, "compression": {"codec": "steps"}, "aggregator": "fedavg"}
    config = resolve(read_config(write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data", sites=3), **fields)))
    folder = RunFolder(config.output)
    run = folder.begin(config)

    def server_with(*sites: str) -> tuple[ServerSide, dict[str, SiteSide]]:
        server, sides = ServerSide(config.output), {}
        for site in sites:
            own = site_config(tmp_path, data={"path": tmp_path / "data" / site}, state=tmp_path / site)
            sides[site] = SiteSide(site, own)
            server.admit(site, sides[site].join(server.proposal))
        server.open()
        return server, sides

    def train(*sites: str) -> ServerSide:
        server, sides = server_with(*sites)

        def carry(work: Work) -> Iterator[Answer]:
            for site, side in sides.items():
                packets = iter(server.packets(site, work))
                if work == "fit":
                    yield Answer(site, 0, fitted=side.fit(packets))
                else:
                    yield Answer(site, 0, scores=server.read_scores(side.validate(packets)))

        assert server.train(carry, lambda: False)
        return server

    everyone = ("site_0", "site_1", "site_2")
    first = train(*everyone).server.tensors
    go_back(folder, 2)
    without = train("site_0", "site_1").server.tensors
    assert not all(torch.equal(without[name], first[name]) for name in first)
    server, sides = server_with(*everyone)
    assert server.present["site_2"].held == 2 and server.held["site_2"] == UNKNOWN
    sides["site_2"].validate(iter(server.packets("site_2", "validate")))
    held = ClientState(tmp_path / "site_2" / "runs" / run / "site").held()
    assert held is not None and all(torch.equal(held[1][name], without[name]) for name in without)


def test_a_server_creates_nothing_in_a_folder_without_a_run(tmp_path: Path):
    with pytest.raises(FlapsamError, match="there is no run here"):
        ServerSide(tmp_path / "elsewhere")
    assert not list(tmp_path.iterdir())


WRONG_SCORES = [
    b"",
    b"[]",
    b"{",
    b'{"validation.mean": 2}',
    b'{"validation.spy": 0.5}',
    b'{"validation.mean": "x"}',
    b'{"validation.mean": 0.5}',
    b'{"validation.mean": "0.5", "validation.ball": "0.5", "validation.core": "0.5"}',
    b'{"validation.mean": true, "validation.ball": true, "validation.core": true}',
    b'{"validation.mean": NaN, "validation.ball": NaN, "validation.core": NaN}',
]
"""Not JSON, not a mapping, out of range, unknown or missing names, text, and what only looks like numbers."""


@pytest.mark.parametrize("answer", WRONG_SCORES)
def test_invalid_scores_are_ignored(answer: bytes, config: RunConfig):
    RunFolder(config.output).begin(config)
    server = ServerSide(config.output)
    assert server.read_scores(answer) is None
    assert server.read_scores(b"{}") == {}
    assert server.read_scores(b'{"validation.mean": 0.5, "validation.ball": null, "validation.core": 1}') == {
        "validation.mean": 0.5,
        "validation.ball": None,
        "validation.core": 1,
    }


def test_an_agreement_without_initial_tensors_has_the_same_contracts(config: RunConfig):
    RunFolder(config.output).begin(config)
    agreement = ServerSide(config.output).agreement
    slim = agreement.without_start()
    assert slim.contract.hash == agreement.contract.hash
    assert slim.up("site_0", 1).hash == agreement.up("site_0", 1).hash
    assert all(torch.equal(slim.start[name], torch.zeros_like(tensor)) for name, tensor in agreement.start.items())


def test_a_run_does_not_end_while_a_required_site_is_gone_and_has_not_got_the_adapter(config: RunConfig, tmp_path: Path):
    config = requiring(config, ["site_0", "site_1"])
    RunFolder(config.output).begin(config)
    server, valid = ServerSide(config.output), SiteSide("site_0", site_config(tmp_path)).join(propose(config))
    for site in ("site_0", "site_1"):
        server.admit(site, valid)
    server.open()
    about: dict = {"cohort": TOGETHER, "round": 0}
    server._record(Delivered(**about, site="site_0", bytes_down=1))
    server._record(AnswerMissing(**about, site="site_1", work="validate", reason="it refused the server's packet"))
    # A site that answers that it cannot do it is in the ledger. It would answer the same again.
    server._check_reached(Delivered, "has not received the adapter")
    server._record(AnswerMissing(**about, site="site_1", work="validate", reason=GONE))
    with pytest.raises(FlapsamError, match=r"site_1 is required \(rounds\.require\) and has not received the adapter"):
        server._check_reached(Delivered, "has not received the adapter")
    # The next job asks only this site.
    assert server.asked("validate") == ["site_1"]
    server._record(Delivered(**about, site="site_1", bytes_down=1))
    server._check_reached(Delivered, "has not received the adapter")


@pytest.mark.parametrize(
    ("require", "gone", "connected", "away"),
    [
        (["a", "b", "c"], ["c"], ["a", "b"], True),
        (["a", "b", "c"], ["c"], ["a", "b", "c"], False),  # its fits die, or its messages are lost
        (["a", "b"], ["c"], ["a", "b"], False),
        (["a", "b"], [], ["a", "b"], False),
        (3, ["c"], ["a", "b"], True),
        (2, ["c"], ["a", "b"], False),
    ],
)
def test_a_job_without_a_site_that_is_away_is_no_failure(
    require: object, gone: list[str], connected: list[str], away: bool, config: RunConfig
):
    info = SimpleNamespace(client_info=[SimpleNamespace(name=site) for site in connected])
    admin = SimpleNamespace(ask=lambda question: info)
    follower = RunFollower(requiring(config, require), cast(AdminLine, admin), Observer(), 0)
    follower.events = [
        AnswerMissing(cohort=TOGETHER, round=1, site="b", reason=GONE),
        JobStarted(cohort=TOGETHER, job="j", sites=["a", "b", "c"]),
        *(AnswerMissing(cohort=TOGETHER, round=2, site=site, reason=GONE) for site in gone),
    ]
    assert follower._is_away(Job("j", ["a", "b", "c"], 0)) == away


@pytest.mark.parametrize(
    ("waited", "patience", "reminded", "due"),
    [
        (4, 10, 0, False),
        (6, 10, 0, True),
        (6, 10, 1, False),
        (2, inf, 0, False),
        (4, inf, 0, True),
        (4, inf, 1, False),
        (7, inf, 1, True),
    ],
)
def test_one_is_reminded_of_a_site_once_or_again_and_again(waited: float, patience: float, reminded: int, due: bool):
    assert is_due(waited, patience, 3, reminded) == due

"""What a site's own file limits, whatever the server asks: settings, cases, rounds, split, scores and memory."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.federation.agreement import SERVER, cut
from flapsam.federation.hospitals.bounds import cases_used, refusals, steps_of
from flapsam.federation.hospitals.handshake import Proposal, SiteFailed
from flapsam.federation.hospitals.journal import Journal, Verified, verify
from flapsam.federation.hospitals.run_config import read_federated_config
from flapsam.federation.hospitals.site_config import SAFE_STRATEGIES, SiteConfig
from flapsam.federation.hospitals.site_side import SiteSide
from flapsam.federation.hospitals.split import fixed_split
from flapsam.federation.packets import Header, encode
from flapsam.federation.preparation import assembled_for, resolve
from flapsam.federation.shares import rounded
from flapsam.learning.prepared import PreparedCase
from flapsam.run.config import Rounds, RunConfig, Training
from flapsam.run.reading import read_config
from flapsam.sam import travelling_state
from flapsam.sam.strategies import STRATEGIES
from flapsam.sites import Case, Site
from tests.helpers.adapters import trained
from tests.helpers.command import flapsam
from tests.helpers.families import SMALL
from tests.helpers.reconstruction import ATTACK, make_volumes, proposal_of, site_of
from tests.helpers.sites import make_sites, write_run

RUN = "0" * 32


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return resolve(read_config(write_run(tmp_path / "run.yaml", make_sites(tmp_path / "data", cases=5))))


def site_config(folder: Path, **fields: Any) -> SiteConfig:
    tree = {"data": {"path": folder / "data" / "site_0"}, "state": folder / "state", "threads": 1}
    return SiteConfig.model_validate({**tree, "bounds": {"min_steps": 1}, **fields})


def joined(config: RunConfig, site: SiteConfig, run: str = RUN) -> SiteSide:
    side = SiteSide("site_0", site)
    side.join(Proposal.of(run, config).model_dump_json().encode())
    return side


def packet(side: SiteSide, number: int) -> bytes:
    """A packet with the initial tensors as the result of round ``number``."""
    agreement, rank = side.client.agreement, side.client.rank
    if number == 0:
        return encode(Header(run=agreement.run, round=0, base=0, sender=SERVER), agreement.nothing(rank), {})
    header = Header(run=agreement.run, round=number, base=None, sender=SERVER)
    return encode(header, agreement.from_server(header, rank), cut(agreement.start, rank))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("training.epochs", 101),
        ("training.batch_size", 257),
        ("training.learning_rate", 0.011),
        ("training.weight_decay", 1.1),
        ("training.betas", (0.4, 0.999)),
        ("training.betas", (0.9, 0.8)),
        ("training.betas", (1.0, 0.999)),
        ("training.cross_entropy", 10),
        ("training.foreground_weight", 11.0),
        ("training.foreground_weight", 0.01),
        ("training.proximal", 11.0),
        ("lora.rank", 65),
        ("samples.size", 1025),
        ("data.labels", {f"class_{number}": number for number in range(1, 34)}),
        ("training.learning_rate", float("inf")),
        ("training.cross_entropy", float("inf")),
    ],
)
def test_a_setting_outside_of_the_bounds_is_refused(field: str, value: Any, config: RunConfig, tmp_path: Path):
    part, name = field.split(".")
    changed = getattr(config, part).model_copy(update={name: value})
    found = list(refusals(config.model_copy(update={part: changed}), site_config(tmp_path)))
    assert [code for code, _ in found] == ["bounds"]
    assert name in found[0][1] or "classes" in found[0][1]
    assert not list(refusals(config, site_config(tmp_path)))


def test_no_strategy_that_is_safe_by_default_trains_patch_or_position_embeddings(config: RunConfig):
    for strategy in STRATEGIES:
        trained = travelling_state(assembled_for(config.model_copy(update={"strategy": strategy})).network)
        embeddings = [
            tensor for tensor in trained if any(part in tensor for part in ("patch_embed", "pos_embed", "rel_pos"))
        ]
        # No attack on flap-volume has been tried yet, so it is not among the safe ones, either.
        assert bool(embeddings) != (strategy in (*SAFE_STRATEGIES, "flap-volume")), strategy


@pytest.mark.usefixtures("small_families")
@pytest.mark.parametrize("backbone", SMALL)
@pytest.mark.parametrize("strategy", sorted(SAFE_STRATEGIES))
def test_no_safe_strategy_trains_what_sees_the_pixels_first(strategy: str, backbone: str):
    trained_names = travelling_state(trained(strategy, backbone=backbone)[0].network)
    first = ("patch_embed", "stem", "pos_embed", "rel_pos", "biases", "convolutions")
    assert not [name for name in trained_names if any(part in name for part in first)]


def case(slices: int, occupied: int) -> PreparedCase:
    return PreparedCase("a", "s", frozenset({1}), slices, frozenset(range(occupied)), (0.0, 1.0), None, Path())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cases", "empty_slices", "used"),
    [
        ([case(4, 1), case(4, 0)], 1.0, 2),
        ([case(4, 1), case(4, 0)], 0.99, 1),
        ([case(4, 0), case(0, 0)], 1.0, 1),
        ([], 1.0, 0),
    ],
)
def test_only_cases_that_a_fit_is_certain_to_use_count(cases: list[PreparedCase], empty_slices: float, used: int):
    assert cases_used(cases, Training(empty_slices=empty_slices), Rounds()) == used


def test_a_run_between_hospitals_does_not_say_how_many_of_a_sites_cases_train(tmp_path: Path):
    config = write_run(tmp_path / "run.yaml", tmp_path)
    with pytest.raises(FlapsamError, match=r"data\.training_cases works in simulations only"):
        read_federated_config(config, ["data.training_cases=2"])
    assert read_federated_config(config).data.training_cases is None


@pytest.mark.parametrize(
    ("steps", "used"),
    [
        # Cases of 8, 4 and 2 slices, in batches of two: seven steps an epoch. One step may be a single slice.
        (1, 1),
        # Half of eight steps: three batches and one slice are seven windows, which may all be of the first case.
        (8, 1),
        # Half of ten: four batches and one slice are nine, more than the first case has.
        (10, 2),
        # Half of twelve, eleven windows.
        (12, 2),
        # Thirteen steps always contain a whole epoch.
        (13, 3),
    ],
)
def test_a_fit_of_few_steps_may_use_few_cases(steps: int, used: int):
    cases = [case(2, 2), case(8, 8), case(4, 4)]
    assert cases_used(cases, Training(batch_size=2), Rounds(steps=steps)) == used


@pytest.mark.parametrize(
    ("fields", "done", "steps"),
    [
        # Twelve slices in batches of three: four steps an epoch, all at the highest rate.
        ({"schedule_power": 0}, 1, 4),
        ({"schedule_power": 0, "epochs": 2}, 1, 8),
        # Warm-up over four steps: rates 1, 1, 2 and 3 quarters of the highest, which is that of the last step, 3.
        ({"warmup_steps": 4}, 0, 7 / 3),
        # The last step of the warm-up and the one after it have the highest rate. Then the rate is 0.
        ({"schedule_power": 1e9}, 1, 2),
        # The schedule is over: nothing is learned.
        ({"schedule_power": 1, "schedule_epochs": 1}, 100, 4),
    ],
)
def test_steps_count_by_their_learning_rate(fields: dict, done: int, steps: float):
    options = Training.model_validate({"batch_size": 3, "window": 1, "warmup_steps": 1, **fields})
    assert steps_of([case(12, 12)], options, done, Rounds(count=1)) == pytest.approx(steps, abs=0.05)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, 0), (1, 5), (7, 5), (8, 10), (52, 50), (53, 55), (99, 100), (104, 100), (105, 110), (12345, 12000)],
)
def test_counts_are_rounded(count: int, expected: int):
    assert rounded(count) == expected


def test_the_first_run_fixes_the_split(config: RunConfig, tmp_path: Path):
    """Neither another seed, other fractions nor a choice of sites changes it, and no case moves when cases are added."""
    joined(config, site_config(tmp_path))
    path = tmp_path / "state" / "split.json"
    first = json.loads(path.read_text())
    assert sorted(first.values()) == ["test", "train", "train", "train", "val"]
    data = config.data.model_copy(
        update={"test_fraction": 0.9, "validation_fraction": 0.9, "simulated_sites": 5, "sites": ["x"]}
    )
    side = joined(config.model_copy(update={"data": data, "seed": 7}), site_config(tmp_path), run="1" * 32)
    assert json.loads(path.read_text()) == first
    assert len(side.client.data.train) == 3 and len(side.client.data.val) == 1


def test_new_cases_join_the_split_of_their_subject(tmp_path: Path):
    def site(*cases: tuple[str, str, str]) -> Site:
        return Site("s", tuple(Case(name, "s", subject, Path(), Path(), split) for name, subject, split in cases))  # type: ignore[arg-type]

    path = tmp_path / "split.json"
    fixed_split(site(("a", "A", "train"), ("b", "B", "test")), path)
    changed = fixed_split(site(("a", "A", "test"), ("a2", "A", "val"), ("b", "B", "train"), ("c", "C", "val")), path)
    assert [case.split for case in changed.cases] == ["train", "train", "test", "val"]
    for damaged in ("[]", "{", '{"a": "all"}', '{"a": 1}', '{"a": []}'):
        path.write_text(damaged)
        with pytest.raises(FlapsamError, match="cannot read the split"):
            fixed_split(site(("a", "A", "train")), path)


def test_rounds_are_counted_over_all_runs_and_only_those_of_the_run_are_answered(config: RunConfig, tmp_path: Path):
    site = site_config(tmp_path, max_rounds=3)
    side = joined(config, site)
    first = side.fit(iter([packet(side, 0)]))
    # A crash after the fit keeps its answer out of the journal. It counts when it leaves.
    lines = site.journal.read_text().splitlines(keepends=True)
    site.journal.write_text("".join(lines[:-1]))
    side.journal = Journal(site.journal)
    for _ in range(2):
        assert side.fit(iter([packet(side, 0)])) == first
    side.fit(iter([packet(side, 1)]))
    with pytest.raises(SiteFailed, match="rounds"):
        side.fit(iter([packet(side, 2)]))
    # Two of three rounds are used, and the next run has two.
    with pytest.raises(SiteFailed, match="rounds"):
        joined(config, site, run="1" * 32)
    entries = [json.loads(line) for line in site.journal.read_text().splitlines()]
    assert [entry["what"] for entry in entries] == ["asked", "joined", "fit", "fit", "refused", "asked", "refused"]
    assert "max_rounds is 3, of which other runs have used 2" in entries[-1]["reasons"][0]


def test_few_scores_leave_and_only_of_enough_cases(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The run has two rounds, so at most four sets of tensors are scored."""
    side = joined(config, site_config(tmp_path))
    first = side.validate(iter([packet(side, 1)]))
    monkeypatch.setattr(side.client, "_scores", lambda: {"validation.mean": 0.123})
    assert side.validate(iter([])) == first and json.loads(first)
    tensor = next(parameter for parameter in side.network.parameters() if parameter.requires_grad)
    for number in range(5):
        monkeypatch.setattr(side.client, "_receive", lambda packets, number=number: tensor.data.fill_(number))
        if number < 3:
            assert json.loads(side.validate(iter([]))) == {"validation.mean": 0.123}
        else:
            with pytest.raises(SiteFailed, match="rounds"):
                side.validate(iter([]))
    few = joined(config, site_config(tmp_path, state=tmp_path / "few", min_validation_cases=2))
    assert json.loads(few.validate(iter([packet(few, 1)]))) == {}
    with pytest.raises(SiteFailed, match="rounds"):
        few.validate(iter([packet(few, 2), packet(few, 3)]))


def test_a_journal_survives_a_crash_and_a_damaged_one_is_named(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    Journal(path).write("fit", RUN, round=1, answer="a", bytes=10)
    with path.open("a") as file:
        file.write('{"what": "fit", "run"')
    journal = Journal(path)
    journal.write("fit", RUN, round=2, answer="b", bytes=10)
    assert Journal(path).fits == {(RUN, "a"), (RUN, "b")}
    path.write_text("{}\n")
    with pytest.raises(FlapsamError, match="cannot read this journal"):
        Journal(path)


def journal_of(path: Path, count: int) -> list[str]:
    """Write a journal, and return its checksums as they were the newest ones."""
    heads = []
    for number in range(count):
        journal = Journal(path)
        journal.write("tested", RUN, round=number, tensors="t", left={1: (0.25, None), "b": "é"})
        heads.append(journal.head)
    return heads


def test_the_checksums_of_a_journal_are_those_of_a_calculation_by_hand(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    heads = journal_of(path, 3)
    before = "0" * 64
    for line, head in zip(path.read_text().splitlines(), heads, strict=True):
        entry = json.loads(line)
        assert entry.pop("chain") == head
        before = hashlib.sha256(f"{before} {json.dumps(entry, sort_keys=True)}".encode()).hexdigest()
        assert before == head
    assert verify(path, heads[0]) == verify(path) == Verified(3, 0, {"tested": 3}, heads[-1])


def edited(lines: list[str], number: int, **fields: object) -> list[str]:
    """Change fields of one entry, and leave its checksum as it was."""
    return [json.dumps({**json.loads(line), **fields}) if i == number else line for i, line in enumerate(lines)]


@pytest.mark.parametrize(
    ("attack", "problem"),
    [
        (lambda lines: edited(lines, 1, left=None), "line 2 was changed"),
        (lambda lines: edited(lines, 1, chain="0" * 64), "line 2 was changed"),
        (lambda lines: [lines[0], *lines[2:]], "line 2 was changed, or a line before it was changed, moved or removed"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1 was changed"),
        (lambda lines: [*lines, lines[-1]], "line 5 was changed"),
        (lambda lines: [*lines[:2], json.dumps({"what": "fit"}), *lines[2:]], "line 3 was changed"),
        (lambda lines: lines[:-1], "no entry has the checksum"),
        (lambda lines: [], "no entry has the checksum"),
        (lambda lines: [*lines[:1], "{", *lines[1:]], "a line in it is damaged"),
    ],
)
def test_a_changed_journal_is_found(attack: Callable, problem: str, tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    noted = journal_of(path, 4)[-1]
    verify(path, noted)
    path.write_text("".join(f"{line}\n" for line in attack(path.read_text().splitlines())))
    with pytest.raises(FlapsamError, match=problem):
        verify(path, noted)


def test_a_journal_that_was_written_again_is_found_by_what_was_noted_and_an_older_one_goes_on(tmp_path: Path):
    """Who may write the file can make a new one with right checksums. Only a note elsewhere shows it."""
    path = tmp_path / "journal.jsonl"
    noted = journal_of(path, 2)[-1]
    entries = list(map(json.loads, path.read_text().splitlines()))
    for entry in entries:
        del entry["chain"]
    path.unlink()
    for entry in entries:
        Journal(path).write(**{**entry, "left": "something else"})
    assert verify(path).entries == 2
    with pytest.raises(FlapsamError, match="written again since it was noted"):
        verify(path, noted)
    # Earlier versions wrote no checksums. New entries cover what was there.
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    Journal(path).write("fit", RUN, answer="a")
    found = verify(path)
    assert (found.entries, found.unchained) == (3, 2)
    path.write_text(path.read_text().replace('"round": 1', '"round": 7'))
    with pytest.raises(FlapsamError, match="line 3 was changed, or a line before it"):
        verify(path)


def test_an_administrator_reads_and_verifies_the_journal(tmp_path: Path, capfd):
    site = site_config(tmp_path)
    (tmp_path / "site.yaml").write_text(f"data: {{path: {tmp_path / 'data' / 'site_0'}}}\nstate: {site.state}\n")
    arguments = ["federation", "journal", tmp_path, "--data", tmp_path / "site.yaml"]
    nothing = flapsam(capfd, *arguments)
    assert nothing.code == 2 and "there is no journal yet" in nothing.err
    head = journal_of(site.journal, 3)[-1]
    assert flapsam(capfd, *arguments).out == site.journal.read_text()
    told = flapsam(capfd, *arguments, "--verify")
    assert told.code == 0 and "3 entries: 3 × tested" in told.out and f"The newest is {head}" in told.out
    assert json.loads(flapsam(capfd, *arguments, "--noted", head, "--json").out)["head"] == head
    site.journal.write_text(site.journal.read_text().replace("0.25", "0.75", 1))
    changed = flapsam(capfd, *arguments, "--noted", head)
    assert changed.code == 2 and "line 1 was changed" in changed.err and "Traceback" not in changed.err


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_the_operating_system_limits_the_memory_of_a_fit():
    program = """
from flapsam.federation.engines.fit_process import limit_memory
from flapsam.federation.hospitals.site_config import SiteConfig
limit_memory(SiteConfig.model_validate({"data": {"path": "x"}, "memory_gib": 0.5}))
bytearray(100 << 20)
try:
    bytearray(600 << 20)
except MemoryError:
    print("refused")
"""
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert outcome.stdout == "refused\n"


@pytest.mark.parametrize(
    ("changes", "own", "code"),
    [
        ({}, {}, "strategy"),
        ({"strategy": "attention"}, {}, "strategy"),
        ({}, {"strategies": ["full"]}, "bounds"),
        ({"learning_rate": 0.01}, {"strategies": ["full"]}, "bounds"),
        ({"learning_rate": 0.01, "betas": (0.5, 0.9)}, {"strategies": ["full"]}, "bounds"),
        # All settings are within their bounds. What is left of the attack is one slice, or one step that has an effect.
        (
            {"learning_rate": 0.01, "betas": (0.5, 0.9), "cross_entropy": 0.1, "schedule_power": 7},
            {"strategies": ["full"]},
            "bounds",
        ),
        (
            {"learning_rate": 0.01, "betas": (0.5, 0.9), "cross_entropy": 0.1, "empty_slices": 1.0},
            {"strategies": ["full"]},
            "bounds",
        ),
        (
            {
                "learning_rate": 0.01,
                "betas": (0.5, 0.9),
                "cross_entropy": 0.1,
                "labels": {"background": [1, 2], "lesion": 99},
            },
            {"strategies": ["full"], "min_cases": 2},
            "cases",
        ),
    ],
)
def test_a_server_that_asks_for_a_training_slice_is_refused(changes: dict, own: dict, code: str, tmp_path: Path):
    side = site_of(make_volumes(tmp_path / "data", 6), tmp_path / "state", metrics=False, **own)
    with pytest.raises(SiteFailed) as refusal:
        side.join(proposal_of({**ATTACK, **changes}))
    assert str(refusal.value) == code

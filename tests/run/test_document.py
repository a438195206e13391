"""What a configuration says that cannot be meant: one sentence, which quotes the author's own line."""

from pathlib import Path

import pytest

from flapsam.base.errors import FlapsamError
from flapsam.federation.hospitals.site_config import read_site_config
from flapsam.run.reading import read_config, read_options

DATA = "data: {path: x, labels: {k: 1}}\n"
BLOCK = "data:\n  path: x\n  labels:\n"

REFUSED: dict[str, tuple[str, str]] = {
    "no as a name": (BLOCK + "    no: 1\n", "YAML reads the name no as false; put it in quotation marks (line 4: no: 1)"),
    "on as a site": (
        DATA + "site_ranks: {on: 4}\n",
        "YAML reads the name on as true; put it in quotation marks (line 2: site_ranks: {on: 4})",
    ),
    "yes as a label value": (
        BLOCK + "    kidney: yes\n",
        "'data.labels.kidney' is a number, but YAML reads yes as true; write a number (line 4: kidney: yes)",
    ),
    "off as a seed": (
        DATA + "seed: off\n",
        "'seed' is a number, but YAML reads off as false; write a number (line 2: seed: off)",
    ),
    "on as a weight": (
        DATA + "rounds: {weights: {a: on}}\n",
        "'rounds.weights.a' is a number, but YAML reads on as true; write a number (line 2: rounds: {weights: {a: on}})",
    ),
    "no in a list of names": (
        "data:\n  path: x\n  labels: {k: 1}\n  sites: [yes, no]\n",
        "YAML reads no as false, so put it in quotation marks if it is text (line 4: sites: [yes, no])",
    ),
    "no for a word": (
        DATA + "strategy: no\n",
        "'strategy': Input should be a valid string; YAML reads no as false, so put it in quotation marks if it is text "
        "(line 2: strategy: no)",
    ),
    "a zero in front": (
        BLOCK + "    kidney: 010\n",
        "YAML reads 010 as the number 8, in base 8; write the number in base 10, or text in quotation marks "
        "(line 4: kidney: 010)",
    ),
    "zeros in a site's name": (
        "data:\n  path: x\n  labels: {k: 1}\n  unseen:\n    - 007\n",
        "YAML reads 007 as the number 7, in base 8; write the number in base 10, or text in quotation marks (line 5: - 007)",
    ),
    "a time": (
        DATA + "rounds:\n  deadline: 1:30\n",
        "YAML reads 1:30 as the number 90, in base 60; write the number in base 10, or text in quotation marks "
        "(line 3: deadline: 1:30)",
    ),
    "a time with seconds": (DATA + "seed: 10:20:30.5\n", "as the number 37230.5, in base 60"),
    "a date": (
        DATA + "output: 2024-01-31\n",
        "YAML reads 2024-01-31 as a date; put it in quotation marks (line 2: output: 2024-01-31)",
    ),
    "a date that is none": (DATA + "output: 2024-13-31\n", "YAML reads 2024-13-31 as a date; put it in quotation marks"),
    "a date as a name": (DATA + "site_ranks: {2024-01-31: 4}\n", "YAML reads the name 2024-01-31 as a date"),
    "a group twice": (
        "rounds: {count: 2}\n" + DATA + "rounds:\n  min_sites: 3\n",
        "'rounds' stands here and in line 1; remove one (line 3: rounds:)",
    ),
    "a class twice": (
        BLOCK + "    kidney: 1\n    kidney: 2\n",
        "'kidney' stands here and in line 4; remove one (line 5: kidney: 2)",
    ),
    "labels the other way round": (
        BLOCK + "    1: kidney\n    2: tumour\n",
        "labels are written as name: value; write kidney: 1 (line 4: 1: kidney)",
    ),
    "quoted labels the other way round": (
        "data: {path: x, labels: {'1': kidney}}\n",
        "labels are written as name: value; write kidney: 1 (line 1: data: {path: x, labels: {'1': kidney}})",
    ),
    "labels of a site the other way round": (
        "data:\n  path: x\n  labels: {k: 1}\n  site_labels:\n    b: {5: k}\n",
        "labels are written as name: value; write k: 5 (line 5: b: {5: k})",
    ),
    "a number as a name": (
        DATA + "site_ranks: {7: 2}\n",
        "YAML reads the name 7 as the number 7; put it in quotation marks (line 2: site_ranks: {7: 2})",
    ),
    "a number as a path": (
        DATA + "output: 2024\n",
        "'output': must be a path; YAML reads 2024 as the number 2024, so put it in quotation marks if it is text "
        "(line 2: output: 2024)",
    ),
    "no name": ("data: {path: x, labels: {~: 1}}\n", "YAML reads the name ~ as nothing"),
    "no value": (
        BLOCK + "    kidney:\n    tumour: 2\n",
        "'data.labels.kidney': it has no value; give it one, or remove it (line 4: kidney:)",
    ),
    "a group without fields": (
        "training:\n  # batch_size: 3\n" + DATA,
        "'training': it has no value; give it one, or remove it (line 1: training:)",
    ),
    "a word for nothing": (
        DATA + "rounds: {patience: none}\n",
        "; for no value, write null (line 2: rounds: {patience: none})",
    ),
    "a decimal comma in braces": (
        DATA + "training: {learning_rate: 0,001}\n",
        "001 has no value; in braces, a comma begins another field (line 2: training: {learning_rate: 0,001})",
    ),
    "a decimal comma": (DATA + "training:\n  learning_rate: 0,001\n", "(line 3: learning_rate: 0,001)"),
    "a list without brackets": (
        BLOCK + "    kidney: 1, 2\n",
        "'data.labels.kidney': several numbers are written as [1, 2] (line 4: kidney: 1, 2)",
    ),
    "a range without brackets": (
        DATA + "samples:\n  clip: -80 300\n",
        "'samples.clip': several numbers are written as [-80, 300] (line 3: clip: -80 300)",
    ),
    "not a number": (
        DATA + "samples: {clip: [.nan, 3]}\n",
        ".nan is not a number; write one (line 2: samples: {clip: [.nan, 3]})",
    ),
    "not a number as text": (DATA + "samples: {clip: ['nan', 3]}\n", "'samples.clip': give the lower bound first"),
    "a word processor's quotation marks": (
        "data:\n  path: x\n  labels: {“kidney”: 1}\n",
        "“ is a word processor's quotation mark; write \" or ' (line 3: labels: {“kidney”: 1})",
    ),
    "no blank after a colon": (DATA + "rounds:\n  count:5\n", "'rounds': must be a mapping of fields (line 3: count:5)"),
    "a tab": (
        "data:\n\tpath: x\n",
        "not valid YAML: found character '\\t' that cannot start any token (line 2: \\tpath: x)",
    ),
    "a path of Windows": (
        'data:\n  path: "C:\\data\\x"\n',
        "not valid YAML: found unknown escape character 'd' (line 2: path: \"C:\\data\\x\")",
    ),
    "one value for two classes": (
        "data:\n  path: x\n  labels: {k: 1, b: [2, 1]}\n",
        "value 1 stands for both k and b (line 3: labels: {k: 1, b: [2, 1]})",
    ),
    "an unknown key": (
        DATA + "traning: {}\n",
        "unknown key 'traning'; remove it or correct its spelling (line 2: traning: {})",
    ),
    "a wrong number": (DATA + "rounds:\n\n  count: -1\n", "(line 4: count: -1)"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_is_one_sentence_with_its_line(text: str, message: str, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(FlapsamError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


ASSIGNED = {
    "seed=010": "YAML reads 010 as the number 8",
    "training.proximal=on": "'training.proximal' is a number, but YAML reads on as true",
    "data.labels={1: kidney}": "labels are written as name: value; write kidney: 1",
    "data.labels={a: 1, a: 2}": "'a' stands here and in line 1",
    "rounds.count=many": "'rounds.count': Input should be a valid integer",
    "seed=[": "not valid YAML",
}


@pytest.mark.parametrize(("assignment", "message"), ASSIGNED.items())
def test_an_assignment_is_quoted_like_a_line(assignment: str, message: str, tmp_path: Path):
    (tmp_path / "run.yaml").write_text(DATA + "rounds: {count: 3}\nseed: 4\n")
    with pytest.raises(FlapsamError) as error:
        read_config(tmp_path / "run.yaml", [assignment])
    assert message in str(error.value)
    assert str(error.value).endswith(f"(--set {assignment})")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_what_is_clear_is_read(encoding: str, tmp_path: Path):
    text = (
        "data: {path: x, labels: {'no': 1, kidney: '2', cyst: 3.0, stone: 0x10, rest: [4, 1_0]}}\r\n"
        "training: &training {checkpointing: yes, augment: on, learning_rate: 1e-4}\r\nserver: {optimizer: none}\r\n"
        "lora: {rank: &rank 4}\r\nsite_ranks: {<<: {a: 2}, b: *rank}\r\nrounds: {patience: ~}\r\n"
        "samples: {clip: [-1e3, .inf]}\r\nnotes: 'yes'\r\n"
    )
    (tmp_path / "run.yaml").write_bytes(text.encode(encoding))
    config = read_config(tmp_path / "run.yaml")
    assert config.data.labels == {"no": 1, "kidney": 2, "cyst": 3, "stone": 16, "rest": [4, 10]}
    assert (config.training.learning_rate, config.training.checkpointing, config.training.augment) == (1e-4, True, "paper")
    assert (config.server.optimizer, config.rounds.patience, config.notes) == ("none", None, "yes")
    assert (config.samples.clip, config.site_ranks) == ((-1000, float("inf")), {"a": 2, "b": 4})


SITE: dict[str, tuple[str, str]] = {
    "a site called no": ("data: {path: x, site: no}\n", "YAML reads no as false, so put it in quotation marks"),
    "a number of cases": ("data: {path: x}\nmin_cases: yes\n", "'min_cases' is a number, but YAML reads yes as true"),
    "a bound": ("data: {path: x}\nbounds: {max_learning_rate: 1:00}\n", "YAML reads 1:00 as the number 60, in base 60"),
    "no data": ("state: here\n", "'data' is missing"),
    "strategies": ("data: {path: x}\nstrategies: [off]\n", "YAML reads off as false"),
}


@pytest.mark.parametrize(("text", "message"), SITE.values(), ids=SITE)
def test_a_sites_own_configuration_is_read_with_the_same_care(text: str, message: str, tmp_path: Path):
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(FlapsamError) as error:
        read_site_config(tmp_path / "site.yaml")
    assert message in str(error.value)


def test_a_federation_file_is_read_with_the_same_care(tmp_path: Path):
    pytest.importorskip("nvflare")
    from flapsam.federation.engines.nvflare.kits import FederationFile

    path = tmp_path / "federation.yaml"
    path.write_text("name: ours\nserver: {host: example.org}\nsites: [north, no]\n")
    with pytest.raises(FlapsamError, match=r"'sites\.1': .*YAML reads no as false, .*\(line 3: sites: \[north, no\]\)"):
        read_options(path, FederationFile)

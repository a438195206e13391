from pathlib import Path

import pytest
import yaml

from flapsam.base.errors import FlapsamError
from flapsam.run.config import Data, Training
from flapsam.run.presets import PRESETS
from flapsam.run.reading import read_config, write_config

MINIMAL = "data: {path: sites, labels: {kidney: 1}}\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_the_paper_preset_has_the_values_of_the_paper(tmp_path: Path):
    config = read_config(write(tmp_path / "run.yaml", MINIMAL + "preset: paper\n"))
    assert config.strategy == "flap"
    assert config.lora.rank == 32
    assert (config.training.learning_rate, config.training.weight_decay) == (8e-4, 0.1)
    assert (config.training.window, config.training.batch_size, config.training.epochs) == (5, 3, 1)
    assert (config.training.cross_entropy, config.training.dice, config.training.foreground_weight) == (0.2, 0.8, 1.0)
    assert (config.training.warmup_steps, config.training.schedule_epochs, config.training.schedule_power) == (250, 200, 7)
    assert (config.rounds.count, config.rounds.weights) == (100, "slices")
    assert (config.samples.scaling, config.samples.channels, config.samples.resize) == ("window", "replicate", "stretch")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_the_fields_that_are_not_given(name: str, tmp_path: Path):
    path = write(tmp_path / "run.yaml", MINIMAL + f"preset: {name}\ntraining: {{learning_rate: 0.5}}\n")
    tree = read_config(path, ["rounds.count=3"]).model_dump()
    given = {("training", "learning_rate"): 0.5, ("rounds", "count"): 3}
    for group, values in PRESETS[name].items():
        if not isinstance(values, dict):
            assert tree[group] == values
            continue
        for field, value in values.items():
            assert tree[group][field] == given.get((group, field), value)
    assert (tree["training"]["learning_rate"], tree["rounds"]["count"]) == (0.5, 3)


def test_the_default_preset_is_fast(tmp_path: Path):
    given, default = (write(tmp_path / f"{n}.yaml", MINIMAL + extra) for n, extra in (("a", "preset: fast\n"), ("b", "")))
    assert read_config(given) == read_config(default) != read_config(default, ["preset=paper"])


def test_paths_are_relative_to_the_file(tmp_path: Path):
    path = write(tmp_path / "run.yaml", MINIMAL + "backbone: {weights: ../sam.pth}\noutput: out\n")
    config = read_config(path)
    assert config.data.path == tmp_path / "sites"
    assert config.output == tmp_path / "out"
    assert config.backbone.weights == tmp_path.parent / "sam.pth"
    assert read_config(path, ["output=elsewhere"]).output == Path("elsewhere")


def test_a_written_configuration_reads_back_the_same(tmp_path: Path):
    original = read_config(write(tmp_path / "run.yaml", MINIMAL + "samples: {clip: [-80, 300]}\n"))
    text = write_config(original)
    reread = read_config(write(tmp_path / "again.yaml", text))
    assert write_config(reread) == text
    assert yaml.safe_load(text)["samples"]["clip"] == [-80.0, 300.0]


def test_fields_are_set_from_the_command_line(tmp_path: Path):
    path = write(tmp_path / "run.yaml", MINIMAL)
    config = read_config(path, ["training.batch_size=4", "modes=[local, federated]", "rounds.weights={a: 1}"])
    assert config.training.batch_size == 4
    assert config.modes == ["local", "federated"]
    assert config.rounds.weights == {"a": 1}


WRONG = {
    "unknown key": (MINIMAL + "traning: {}\n", [], "unknown key 'traning'; remove it or correct its spelling"),
    "unknown inner key": (MINIMAL + "training: {lr: 1}\n", [], "unknown key 'training.lr'"),
    "unknown preset": (MINIMAL + "preset: best\n", [], "preset: there is no 'best'; choose paper or fast or private"),
    "a preset that is no name": (MINIMAL + "preset: [fast]\n", [], "preset: there is no '['fast']'"),
    "a group that is none": (MINIMAL + "training: 3\n", [], "'training'"),
    "missing": ("seed: 1\n", [], "'data' is missing"),
    "wrong type": (MINIMAL + "rounds: {count: many}\n", [], "'rounds.count'"),
    "below the least": (MINIMAL + "rounds: {count: -1}\n", [], "'rounds.count'"),
    "not YAML": ("a: [1\n", [], "not valid YAML"),
    "no mapping": ("- 1\n", [], "a configuration is a mapping"),
    "even window": (MINIMAL + "training: {window: 4}\n", [], "'training.window': must be odd"),
    "clip upside down": (MINIMAL + "samples: {clip: [3, 1]}\n", [], "'samples.clip': give the lower bound first"),
    "no class": ("data: {path: x, labels: {background: 3}}\n", [], "name at least one class"),
    "value twice": ("data: {path: x, labels: {a: 1, b: [2, 1]}}\n", [], "value 1 stands for both a and b"),
    "unknown class at a site": (
        "data: {path: x, labels: {a: 1}, site_labels: {s: {c: 2}}}\n",
        [],
        "site_labels.s: c is not among labels",
    ),
    "no assignment": (MINIMAL, ["seed"], "--set seed: write it as field=value"),
    "assignment into a value": (MINIMAL + "strategy: full\n", ["strategy.name=x"], "strategy is a single value"),
    "unknown assignment": (MINIMAL, ["sed=1"], "unknown key 'sed'"),
}


@pytest.mark.parametrize(("text", "assignments", "message"), WRONG.values(), ids=WRONG)
def test_errors_name_the_field_in_one_line(text: str, assignments: list[str], message: str, tmp_path: Path):
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(FlapsamError) as error:
        read_config(path, assignments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_configuration_is_an_error(tmp_path: Path):
    with pytest.raises(FlapsamError, match=r"run\.yaml: cannot read the configuration \(No such file"):
        read_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(("given", "meant"), [(True, "paper"), (False, "none"), ("gentle", "gentle")])
def test_augmentation_may_still_be_true_or_false(given: bool | str, meant: str):
    assert Training.model_validate({"augment": given}).augment == meant


LABELS: dict[str, tuple[dict, list[str]]] = {
    "reserved names": ({"background": 4, "kidney": 1, "ignore": 255}, ["kidney"]),
    "in capitals": ({"Background": 0, "kidney": 1, "IGNORE": 255}, ["kidney"]),
    "as in labelme and CVAT": ({"_background_": 0, "kidney": 1, "__ignore__": 255}, ["kidney"]),
    "hyphens and spaces": ({"back-ground": 4, "Back ground": 5, "kidney": 1}, ["kidney"]),
    "another name for 0": ({"air": 0, "kidney": 1}, ["kidney"]),
    "0 as a list": ({"air": [0], "kidney": 1}, ["kidney"]),
    "0 is ignored": ({"ignore": 0, "healthy": 1, "kidney": 2}, ["healthy", "kidney"]),
    "names that contain a reserved one": ({"background noise": 1, "ignored": 2}, ["background noise", "ignored"]),
}


@pytest.mark.parametrize(("labels", "classes"), LABELS.values(), ids=LABELS)
def test_background_ignore_and_the_value_0_are_no_classes(labels: dict, classes: list[str]):
    assert Data(path=Path(), labels=labels).classes == classes


@pytest.mark.parametrize(
    ("labels", "of_site", "message"),
    [
        ({"kidney": [0, 1]}, {}, "labels: kidney has the value 0, which is the background"),
        ({"kidney": 0, "cyst": 1, "background": 255}, {}, "labels: kidney has the value 0, which is the background"),
        ({"kidney": 0}, {}, "name at least one class"),
        ({"Background": 0, "ignore": 1}, {}, "name at least one class"),
        ({"kidney": 1}, {"kidney": 0}, "site_labels.a: kidney has the value 0, which is the background"),
        ({"kidney": 1, "Ignore": 255}, {"kidney": 255}, "value 255 stands for both"),
        ({"kidney": 1, "mean": 2}, {}, "mean is the name of the mean over the classes; give the class another name"),
    ],
)
def test_values_and_names_with_a_meaning_of_their_own_are_refused(labels: dict, of_site: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Data(path=Path(), labels=labels, site_labels={"a": of_site} if of_site else {})

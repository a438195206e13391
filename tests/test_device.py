import pytest
import torch

from flapsam.device import find_device, find_precision
from flapsam.errors import FlapsamError


def test_an_unknown_device_is_said():
    with pytest.raises(FlapsamError, match="use cpu, cuda, mps or auto"):
        find_device("abacus")


@pytest.mark.parametrize(
    ("name", "capabilities", "expected"),
    [
        ("fp32", {"avx512_bf16": True}, "fp32"),
        ("bf16", {}, "bf16"),
        ("auto", {"avx512_bf16": True}, "bf16"),
        ("auto", {"amx_bf16": True}, "bf16"),
        ("auto", {"avx2": True, "avx512_bf16": False}, "fp32"),
    ],
)
def test_precision_follows_the_processor(name: str, capabilities: dict, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert find_precision(name, torch.device("cpu")) == expected


def test_precision_on_other_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert find_precision("auto", torch.device("cuda")) == "bf16"
    assert find_precision("auto", torch.device("mps")) == "fp32"

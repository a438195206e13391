"""What other users of the machine can see of the viewer's address, which is its only secret."""

import threading
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nibabel
import numpy as np
import pytest

from flapsam.base.errors import FlapsamError
from flapsam.report.scene import scene_of
from flapsam.report.viewing import image_server, opened
from flapsam.volumes import write_fractions
from tests.helpers.sites import SHAPE, save


def test_a_browser_finds_the_address_in_a_file_that_only_its_user_can_read(tmp_path: Path, monkeypatch):
    server, address = image_server(save(np.ones(SHAPE, np.float32), tmp_path / "image.nii.gz"), [], None, 0)
    arguments: list[str] = []
    monkeypatch.setattr("webbrowser.open", arguments.append)
    with opened(address):
        (argument,) = arguments
        page = Path(unquote(urlsplit(argument).path))
        assert argument.startswith("file:///") and server.token not in argument
        assert (page.parent.stat().st_mode & 0o777, page.stat().st_mode & 0o777) == (0o700, 0o600)
        text = page.read_text()
        assert f'<meta http-equiv="refresh" content="0; url={address}">' in text
    assert not page.exists()
    threading.Thread(target=server.run, daemon=True).start()
    try:
        with urllib.request.urlopen(address) as answer:
            assert "image.nii.gz" in answer.read().decode()
    finally:
        server.close()


def test_a_label_map_in_another_order_is_shown_in_the_images(tmp_path: Path):
    labels = np.random.default_rng(0).integers(0, 3, SHAPE, np.uint8)
    image = save(labels.astype(np.float32), tmp_path / "image.nii.gz")
    turned = nibabel.Nifti1Image(labels, nibabel.load(image).affine).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))  # pyright: ignore
    nibabel.save(turned, tmp_path / "labels.nii.gz")
    scene = scene_of(image, [("prediction", tmp_path / "labels.nii.gz")], ["a", "b"])
    np.testing.assert_array_equal(scene.layers[1].read().array, labels)


def test_the_uncertainty_is_a_layer_of_fractions_on_the_images_grid(tmp_path: Path):
    shares = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    image = save(np.ones(SHAPE, np.float32), tmp_path / "image.nii.gz")
    write_fractions(shares, image, nibabel.load(image).affine, tmp_path / "uncertainty.nii.gz", "uncertainty")  # pyright: ignore
    scene = scene_of(image, [("prediction", image)], ["a"], tmp_path / "uncertainty.nii.gz")
    assert [(layer.name, layer.fractions) for layer in scene.layers] == [
        ("image", False),
        ("prediction", False),
        ("uncertainty", True),
    ]
    np.testing.assert_allclose(scene.layers[2].read().array, shares / 255, atol=1e-6)
    write_fractions(shares[:3], image, nibabel.load(image).affine, tmp_path / "other.nii.gz", "uncertainty")  # pyright: ignore
    with pytest.raises(FlapsamError, match=r"other\.nii\.gz: has shape"):
        scene_of(image, [], [], tmp_path / "other.nii.gz")

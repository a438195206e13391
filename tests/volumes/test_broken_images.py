"""Broken images in one command: the others are segmented, each broken one is reported once, and nothing is half-written."""

import gzip
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import SimpleITK as sitk

from flapsam.volumes import Volume
from tests.helpers.adapters import saved
from tests.helpers.command import flapsam
from tests.helpers.dicom import changed, save_enhanced, save_series
from tests.helpers.sites import SHAPE, save
from tests.volumes.test_formats import save_as

RNG = np.random.default_rng(0)
ARRAY = RNG.integers(-100, 100, size=SHAPE).astype(np.int16)
AFFINE = np.diag([-1.0, -1.0, 3.0, 1.0])
NOISE = RNG.normal(size=SHAPE).astype(np.float32)
GOOD = "good"


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def nifti(path: Path, change: Callable[[bytearray], None] = lambda header: None) -> Path:
    """Save an uncompressed file, with its header changed by ``change``."""
    save(NOISE, path)
    whole = bytearray(path.read_bytes())
    change(whole)
    path.write_bytes(whole)
    return path


def dimensions(*sizes: int) -> Callable[[bytearray], None]:
    """Change field ``dim`` of a NIfTI header, which is bytes 40 to 55."""

    def change(header: bytearray) -> None:
        header[40:56] = np.array([len(sizes), *sizes, *[1] * (7 - len(sizes))], "<i2").tobytes()

    return change


def compress(path: Path, plain: Path) -> None:
    path.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()


def save_singular(path: Path) -> None:
    image = nibabel.Nifti1Image(NOISE, None)
    image.header.set_sform(np.diag([1.0, 0.0, 1.0, 1.0]), code=2)
    nibabel.save(image, path)


def itk(path: Path, array: np.ndarray, vector: bool = False) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path))
    return path


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def series(folder: Path, change: Callable = lambda header, index: None, **options: object) -> Path:
    return save_series(folder, ARRAY, AFFINE, change=change, **options)  # type: ignore[arg-type]


def at(index: int, field: str, value: object) -> Callable[[pydicom.Dataset, int], None]:
    """Set a value in the header of one slice."""
    return lambda header, number: setattr(header, field, value) if number == index else None


def slices(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def without(field: str) -> Callable[[pydicom.Dataset, int], None]:
    return lambda header, number: delattr(header, field)


def spread_out(header: pydicom.Dataset, index: int) -> None:
    """Space the slices farther and farther apart."""
    header.ImagePositionPatient = [0, 0, 3.0 * index + 0.2 * index**2]


def two_time_points(header: pydicom.Dataset, index: int) -> None:
    """Put two slices at every position, as in a series with two time points."""
    header.ImagePositionPatient = [0, 0, 3.0 * (index // 2)]


def make_rgb(header: pydicom.Dataset, index: int) -> None:
    header.SamplesPerPixel, header.PhotometricInterpretation, header.PlanarConfiguration = 3, "RGB", 0


def save_garbled(folder: Path) -> None:
    """Save a series with compressed pixel data that no decoder understands."""
    for path in slices(series(folder)):
        changed(path, lambda header: header.compress("1.2.840.10008.1.2.5"))
        whole = path.read_bytes()
        start = whole.index(b"\xfe\xff\x00\xe0", whole.index(b"\xe0\x7f\x10\x00") + 20)
        path.write_bytes(whole[: start + 8] + bytes(b ^ 0x5A for b in whole[start + 8 : -8]) + whole[-8:])


def save_too_many_frames(folder: Path) -> None:
    """Save a file that claims more frames than have a position."""
    changed(save_enhanced(folder / "more.dcm", ARRAY, AFFINE, range(6)), lambda header: setattr(header, "NumberOfFrames", 7))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    # NIfTI
    "nifti/cut.nii.gz": (lambda p: cut(save(NOISE, p), 0.6), "the file is truncated or damaged"),
    "plain/cut.nii": (lambda p: cut(nifti(p), 0.6), "its header promises"),
    "plain/header_only.nii": (lambda p: cut(nifti(p), 0.05), "its header promises"),
    "plain/half_a_header.nii": (lambda p: cut(nifti(p), 0.02), "not a readable NIfTI file"),
    "nifti/empty.nii.gz": (lambda p: p.write_bytes(b""), "not a readable NIfTI file"),
    "nifti/text.nii.gz": (lambda p: p.write_text("hello"), "not a readable NIfTI file"),
    "plain/no_slices.nii": (lambda p: nifti(p, dimensions(20, 16, 0)), "the volume is empty"),
    "nifti/flat.nii.gz": (lambda p: save(NOISE[..., 0], p), "a 3-D volume is needed, but this file has 2 dimensions"),
    "nifti/five.nii.gz": (lambda p: save(np.zeros((4, 4, 4, 2, 2), np.float32), p), "this file has 5 dimensions"),
    "nifti/film.nii.gz": (lambda p: save(np.zeros((4, 4, 4, 30), np.float32), p), "the file has 30 modalities"),
    "nifti/two.nii.gz": (lambda p: save(np.zeros((4, 4, 4, 2), np.float32), p), "the adapter was trained on 1"),
    "nifti/nan.nii.gz": (
        lambda p: save(np.where(NOISE > 2, np.nan, NOISE).astype(np.float32), p),
        "voxels are NaN or infinite",
    ),
    "nifti/infinite.nii.gz": (lambda p: save(np.full(SHAPE, np.inf, np.float32), p), "voxels are NaN or infinite"),
    "plain/liar.nii": (lambda p: nifti(p, dimensions(32000, 32000, 32000)), "its header promises"),
    "nifti/liar.nii.gz": (
        lambda p: compress(p, nifti(p.with_name("l.nii"), dimensions(32000, 32000, 32000))),
        "its header promises",
    ),
    "plain/negative.nii": (lambda p: nifti(p, dimensions(20, -16, 6)), "the volume is empty"),
    "nifti/nowhere.nii.gz": (save_singular, "the affine is singular"),
    "nifti/colours.nii.gz": (
        lambda p: save(np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), p),
        "one plain number per voxel",
    ),
    "nifti/waves.nii.gz": (lambda p: save(np.zeros((4, 4, 4), np.complex64), p), "one plain number per voxel"),
    "nifti/dangling.nii.gz": (lambda p: p.symlink_to(p.with_name("gone")), "no such file"),
    # NRRD and MetaImage
    "nrrd/cut.nrrd": (lambda p: cut(itk(p, NOISE), 0.6), "cut.nrrd: "),
    "meta/cut.mha": (lambda p: cut(itk(p, NOISE), 0.6), "cut.mha: "),
    "nrrd/text.nrrd": (lambda p: p.write_text("hello"), "not a readable NRRD file, but text"),
    "meta/text.mha": (lambda p: p.write_text("hello"), "not a readable MetaImage file, but text"),
    "nrrd/times.nrrd": (lambda p: itk(p, NOISE[None]), "a 3-D volume is needed, but this file's space has four dimensions"),
    "nrrd/flat.nrrd": (lambda p: itk(p, NOISE[0]), "a 3-D volume is needed, but this file has 2 dimensions"),
    "meta/nan.mha": (lambda p: itk(p, np.full(SHAPE, np.nan, np.float32)), "voxels are NaN or infinite"),
    "nrrd/colours.nrrd": (lambda p: itk(p, np.zeros((4, 4, 4, 3), np.uint8), True), "one plain number per voxel"),
    "nrrd/liar.nrrd": (
        lambda p: replace_bytes(itk(p, NOISE), b"sizes: 6 16 20", b"sizes: 60000 60000 60000"),
        "its header promises",
    ),
    "meta/liar.mha": (
        lambda p: replace_bytes(itk(p, NOISE), b"DimSize = 6 16 20", b"DimSize = 60000 60000 60000"),
        "its header promises",
    ),
    "meta/alone.mhd": (lambda p: (itk(p, NOISE), p.with_name("alone.raw").unlink()), "alone.raw, is missing"),
    # DICOM
    "dicom/gap": (lambda p: slices(series(p))[3].unlink(), "1 slice is missing after made_up_0002.dcm"),
    "dicom/two_series": (lambda p: (series(p), series(p, series="other")), "2 series in one folder"),
    "dicom/no_pixels": (lambda p: series(p, without("PixelData")), "it has no pixel data"),
    "dicom/cut_slice": (lambda p: cut(slices(series(p))[2], 0.7), "made_up_0002.dcm: its pixel data cannot be read"),
    "dicom/cut_header": (lambda p: cut(slices(series(p))[2], 0.1), "made_up_0002.dcm: "),
    "dicom/no_dicom": (lambda p: slices(series(p))[2].write_text("hello"), "made_up_0002.dcm: not a readable DICOM file"),
    "dicom/uneven": (lambda p: series(p, spread_out), "its slices are unevenly spaced, 3.2 to 4.8 mm apart"),
    "dicom/shifted": (
        lambda p: series(p, at(3, "ImagePositionPatient", [5, 0, 9])),
        "made_up_0003.dcm: its slice is shifted sideways",
    ),
    "dicom/time_points": (lambda p: series(p, two_time_points), "3 slices have the same position as another"),
    "dicom/other_size": (lambda p: series(p, at(4, "Rows", 8)), "made_up_0004.dcm: its slice differs in size"),
    "dicom/turned": (
        lambda p: series(p, at(4, "ImageOrientationPatient", [0, 1, 0, 1, 0, 0])),
        "its slice differs in orientation",
    ),
    "dicom/placeless": (lambda p: series(p, without("ImagePositionPatient")), "ImagePositionPatient is missing"),
    "dicom/spaceless": (lambda p: series(p, without("PixelSpacing")), "PixelSpacing is missing"),
    "dicom/colourful": (lambda p: series(p, make_rgb), "voxels are colours"),
    "dicom/rowless": (lambda p: series(p, lambda header, index: setattr(header, "Rows", 0)), "the image is empty"),
    "dicom/liar_dicom": (lambda p: series(p, lambda header, index: setattr(header, "Rows", 60000)), "its header promises"),
    "dicom/garbled": (save_garbled, "its pixel data cannot be read"),
    "dicom/enhanced_gap": (
        lambda p: save_enhanced(p / "gap.dcm", ARRAY, AFFINE, [0, 1, 2, 4, 5]),
        "1 slice is missing",
    ),
    "dicom/frames": (save_too_many_frames, "its header is damaged or does not position its slices"),
}


def make(root: Path) -> None:
    for name, (spoil, _) in BROKEN.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        spoil(root / name)
    for end in (".nii.gz", ".nrrd", ".mha"):
        save_as(Volume(ARRAY, AFFINE), root / f"{GOOD}_{end.split('.')[1]}{end}")
    series(root / f"{GOOD}_dicom")


def test_every_broken_image_is_reported_once_and_the_rest_are_segmented(tmp_path: Path, capfd):
    make(tmp_path / "in")
    outcome = flapsam(capfd, "predict", saved(tmp_path / "a"), tmp_path / "in", "-o", tmp_path / "out")
    assert outcome.code == 1
    heading, *errors = [line for line in outcome.err.splitlines() if "images were not segmented" in line or line[:2] == "- "]
    assert heading == f"{len(BROKEN)} of {len(BROKEN) + 4} images were not segmented:"
    assert len(errors) == len(BROKEN)
    for name, (_, message) in BROKEN.items():
        matching = [line for line in errors if re.search(rf"/in/{re.escape(name)}(/\S+)?: ", line)]
        assert len(matching) == 1, f"{name}: {matching}"
        assert message in matching[0]
        assert "unexpected" not in matching[0]
        assert "Traceback" not in matching[0]
    written = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    expected = {"good_nii.nii.gz", "good_nrrd.seg.nrrd", "good_mha.mha", "good_dicom.nii.gz", "good_dicom.seg.dcm"}
    assert written == expected | {"labels.txt", "predictions.jsonl", "volumes.csv"}
    assert len((tmp_path / "out" / "volumes.csv").read_text().splitlines()) == 5


def test_a_full_disk_affects_only_the_images_that_do_not_fit(tmp_path: Path):
    """A limit on the file size simulates a full disk. In every format, the smaller images before and after are written."""
    large = Volume(RNG.integers(-1000, 1000, size=(160, 160, 24)).astype(np.int16), AFFINE)
    small = Volume(np.zeros((8, 8, 3), np.int16), AFFINE)
    kinds = {"nifti": ".nii.gz", "nrrd": ".nrrd", "meta": ".mha", "dicom": ""}
    for kind, end in kinds.items():
        for name, volume in (("a", small), ("b", large), ("c", small)):
            path = tmp_path / "in" / kind / f"{name}{end}"
            save_as(volume, path) if end else save_series(path, volume.array, volume.affine)
    program = Path(sys.executable).with_name("flapsam")
    command = [program, "predict", saved(tmp_path / "adapter"), tmp_path / "in", "-o", tmp_path / "out"]
    limit = 12_000

    def limit_file_size() -> None:
        # The hard limit stays, because voxels pass from process to process in files in memory, which a full disk spares.
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    outcome = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit_file_size, check=False)
    assert outcome.returncode == 1, outcome.stderr
    errors = [line for line in outcome.stderr.splitlines() if line[:2] == "- "]
    for kind in kinds:
        (error,) = [line for line in errors if f"/{kind}/b." in line]
        assert re.search(r"/out/\w+/b\.\S+: cannot be written", error), error
        assert {path.name.split(".")[0] for path in (tmp_path / "out" / kind).iterdir()} == {"a", "c"}
    assert len(errors) == len(kinds)

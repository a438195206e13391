"""Synthetic sites with CT-like abdomens, kidneys and tumours, so that flapsam can be tried without a download.

Kidneys have the same intensity as spleen, liver and vessels, and tumours the same as muscle, bowel and lesions of the
liver. A threshold therefore does not separate them; their place and shape do. Sites differ in contrast phase, noise, blur,
spacing, organ size and in the orientation of their files. All lengths are in mm. Axes are x to the right, y to the front
and z to the head.
"""

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from flapsam.base.files import check_writable, write_text
from flapsam.base.seeds import seed_for
from flapsam.sites.folders import TABLE
from flapsam.volumes import Volume, write_volume

KIDNEY, TUMOUR = 1, 2
EXTENT = (320.0, 240.0, 150.0)
"""Extent of a volume along x, y and z."""
ORIENTATIONS = ("RAS", "IPL", "LPS", "ASR")

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scanner:
    """Imaging characteristics of one site. Intensities are in Hounsfield units."""

    orientation: str
    spacing: tuple[float, float, float]
    kidney: float
    vessels: float
    noise: float
    blur: float
    """Standard deviation of the Gaussian point spread, in mm."""
    size: float
    """Scale factor of the organs' lengths."""
    offset: float


def make_phantom(
    folder: Path, *, sites: int = 4, cases: int = 10, seed: int = 0, on_case: Callable[[], None] = lambda: None
) -> None:
    """Write ``sites`` folders of ``cases`` cases each, and ``sites.csv``, with three in ten cases for testing.

    Args:
        folder: the output folder. Existing files are overwritten.
        sites: number of sites.
        cases: number of cases at each site.
        seed: seed of all random draws.
        on_case: called after every case.

    Raises:
        FlapsamError: the folder cannot be written.
    """
    check_writable(folder)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["case", "site", "split", "subject"])
    for number in range(1, sites + 1):
        site = f"site_{number:02d}"
        scanner = draw_scanner(number, np.random.default_rng(seed_for(seed, site)))
        for index in range(1, cases + 1):
            case = f"phantom_{number:02d}_{index:03d}"
            image, label = draw_case(scanner, np.random.default_rng(seed_for(seed, site, case)))
            write_volume(image, folder / site / "images" / f"{case}.nii.gz")
            write_volume(label, folder / site / "labels" / f"{case}.nii.gz")
            writer.writerow([case, site, "test" if index > cases - max(round(0.3 * cases), 1) else "train", case])
            on_case()
    write_text(folder / TABLE, table.getvalue())


def draw_scanner(number: int, rng: np.random.Generator) -> Scanner:
    """Draw the imaging characteristics of site ``number``."""
    in_plane = rng.uniform(2.6, 3.6)
    return Scanner(
        orientation=ORIENTATIONS[(number - 1) % len(ORIENTATIONS)],
        spacing=(in_plane, in_plane, rng.uniform(5, 8)),
        kidney=rng.uniform(105, 190),
        vessels=rng.uniform(110, 200),
        noise=rng.uniform(10, 40),
        blur=rng.uniform(0.5, 3),
        size=rng.uniform(0.85, 1.15),
        offset=rng.uniform(-25, 25),
    )


def draw_case(scanner: Scanner, rng: np.random.Generator) -> tuple[Volume, Volume]:
    """Draw one patient at a site: image (int16) and label map (uint8: 1 kidney, 2 tumour)."""
    body = _Body(scanner, rng)
    image, label = body.paint()
    image = gaussian_filter(image, [scanner.blur / spacing for spacing in scanner.spacing])
    image += rng.normal(0, scanner.noise, image.shape) + scanner.offset
    affine = np.diag([*scanner.spacing, 1.0])
    affine[:3, 3] = [-length / 2 for length in EXTENT]
    return (
        _oriented(Volume(np.rint(image).clip(-1024, 3071).astype(np.int16), affine), scanner.orientation),
        _oriented(Volume(label, affine), scanner.orientation),
    )


class _Body:
    """One patient, drawn organ by organ."""

    def __init__(self, scanner: Scanner, rng: np.random.Generator) -> None:
        self.scanner = scanner
        self.rng = rng
        self.shape = tuple(round(length / spacing) for length, spacing in zip(EXTENT, scanner.spacing, strict=True))
        axes = [
            (np.arange(n, dtype=np.float32) + 0.5) * spacing - length / 2
            for n, spacing, length in zip(self.shape, scanner.spacing, EXTENT, strict=True)
        ]
        self.x, self.y, self.z = np.meshgrid(*axes, indexing="ij")
        self.image = np.full(self.shape, -1000, np.float32)
        self.label = np.zeros(self.shape, np.uint8)
        self.size = scanner.size * rng.uniform(0.92, 1.08)
        rough = gaussian_filter(
            rng.normal(size=self.shape).astype(np.float32), [6 / d for d in scanner.spacing], mode="wrap"
        )
        self.texture = rough / rough.std()

    def paint(self) -> tuple[Field, NDArray[np.uint8]]:
        rng = self.rng
        wide, deep = 140 * self.size + rng.normal(0, 6), 98 * self.size + rng.normal(0, 5)
        fat = rng.uniform(0.80, 0.90)
        self._fill(self._cylinder(0, 0, wide, deep), -100, 12)
        self._fill(self._cylinder(0, 0, wide * fat, deep * fat), 55, 12)
        inside = self._cylinder(0, 4, wide * fat - 10, deep * fat - 10)
        self._fill(inside, -95, 12)
        back = -0.55 * deep
        self._fill(self._cylinder(0, back, 24, 21), 50, 10)
        self._fill(self._cylinder(0, back + 2, 19, 17), rng.uniform(180, 320), 60)
        for side in (-1, 1):
            self._fill(self._cylinder(side * 36, back + 4, 17, 20), 58, 10)
        self._bowel(inside, deep)
        self._fill(self._cylinder(-12, back + 32, 10, 10), self.scanner.vessels, 6)
        self._fill(self._cylinder(14, back + 34, 12, 9), 0.9 * self.scanner.vessels, 6)
        self._liver_and_spleen(deep)
        ill = rng.choice([-1, 1])
        for side in (-1, 1):
            self._kidney(side, deep, tumour=side == ill or rng.random() < 0.25)
        return self.image, self.label

    def _liver_and_spleen(self, deep: float) -> None:
        rng, s = self.rng, self.size
        liver = self._ellipsoid((68 * s, 0.2 * deep, 55), (62 * s, 58 * s, 62), jitter=6)
        self._fill(liver, rng.uniform(85, 120), 10)
        for _ in range(rng.integers(1, 4)):
            spot = (68 * s + rng.normal(0, 25), 0.2 * deep + rng.normal(0, 22), 45 + rng.normal(0, 22))
            lesion = self._ellipsoid(spot, (rng.uniform(8, 18),) * 3) & liver
            self._fill(lesion, self._tumour_intensity(), 12)
        spleen = self._ellipsoid((-88 * s, -0.1 * deep, 50), (28 * s, 42 * s, 38), jitter=6)
        self._fill(spleen, rng.uniform(0.85, 1.05) * self.scanner.kidney, 10)

    def _bowel(self, inside: Mask, deep: float) -> None:
        rng = self.rng
        for _ in range(rng.integers(14, 22)):
            centre = (rng.uniform(-95, 95) * self.size, rng.uniform(-0.1, 0.65) * deep, rng.uniform(-75, 35))
            loop = self._ellipsoid(centre, tuple(rng.uniform(11, 26, 3))) & inside
            self._fill(loop, rng.choice([rng.uniform(0, 90), rng.uniform(60, 190), -600], p=[0.5, 0.4, 0.1]), 15)

    def _kidney(self, side: int, deep: float, *, tumour: bool) -> None:
        rng, s = self.rng, self.size
        centre = (side * (60 * s + rng.normal(0, 5)), -0.36 * deep + rng.normal(0, 5), -8 - 6 * side + rng.normal(0, 10))
        radii = (rng.uniform(24, 30) * s, rng.uniform(21, 27) * s, rng.uniform(44, 56) * s)
        tilt = side * rng.normal(0.25, 0.1)
        whole = self._ellipsoid(centre, radii, tilt=tilt)
        hilum = self._ellipsoid(
            (centre[0] - side * 0.9 * radii[0], centre[1], centre[2]), (0.75 * radii[0], 10, 0.45 * radii[2])
        )
        medulla = self._ellipsoid(centre, tuple(0.62 * r for r in radii), tilt=tilt)
        kidney = whole & ~hilum
        level = self.scanner.kidney * rng.uniform(0.93, 1.07)
        self._fill(whole & hilum, -80, 12)
        self._fill(kidney, level, 8)
        self._fill(kidney & medulla, 0.88 * level, 8)
        self.label[whole & hilum] = 0
        self.label[kidney] = KIDNEY
        if tumour:
            around = rng.normal(size=3)
            around /= np.linalg.norm(around)
            place = tuple(c + 0.8 * r * a for c, r, a in zip(centre, radii, around, strict=True))
            mass = self._ellipsoid(place, tuple(rng.uniform(12, 26) * s * rng.uniform(0.85, 1.15, 3)))
            self._fill(mass, self._tumour_intensity(), 14)
            self.label[mass] = TUMOUR

    def _tumour_intensity(self) -> float:
        return self.rng.uniform(0.38, 0.62) * self.scanner.kidney

    def _fill(self, mask: Mask, level: float, texture: float) -> None:
        """Paint a mask with an intensity and a smooth texture of the given standard deviation."""
        shift = tuple(int(self.rng.integers(n)) for n in self.shape)
        self.image[mask] = level + texture * np.roll(self.texture, shift, axis=(0, 1, 2))[mask]

    def _cylinder(self, x: float, y: float, wide: float, deep: float) -> Mask:
        return ((self.x - x) / wide) ** 2 + ((self.y - y) / deep) ** 2 <= 1

    def _ellipsoid(
        self, centre: tuple[float, ...], radii: tuple[float, ...], *, tilt: float = 0.0, jitter: float = 0.0
    ) -> Mask:
        """Mask of an ellipsoid, rotated by ``tilt`` radians in the x-z plane and shifted at random by ``jitter``."""
        x, y, z = (
            axis - c - (self.rng.normal(0, jitter) if jitter else 0)
            for axis, c in zip((self.x, self.y, self.z), centre, strict=True)
        )
        x, z = np.cos(tilt) * x + np.sin(tilt) * z, np.cos(tilt) * z - np.sin(tilt) * x
        return (x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2 <= 1


def _oriented(volume: Volume, codes: str) -> Volume:
    """A canonical volume, stored with its axes in another orientation."""
    change = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(tuple(codes)))
    array = orientations.apply_orientation(volume.array, change)
    return Volume(np.ascontiguousarray(array), volume.affine @ orientations.inv_ornt_aff(change, volume.array.shape))

"""A trained adapter, ready to segment, for Python programs and for ``flapsam predict``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from flapsam.adapters.store import AdapterCard, load_adapter
from flapsam.adapters.trained import find_trained
from flapsam.base.device import find_device
from flapsam.base.errors import FlapsamError
from flapsam.learning.inference import OFFERED, Precision, Prediction, PredictionOptions, predict_volume, usual_precision
from flapsam.run.config import Checkpoint
from flapsam.sam import Sam, fuse
from flapsam.volumes import Legend, Volume, labels_like, legend_of, read_image, source_at, volume_of


class Model:
    """A network with its adapter merged into it, ready to segment volumes."""

    def __init__(self, network: Sam, card: AdapterCard, precision: Precision = "fp32") -> None:
        """Merge the adapter into its network.

        Args:
            network: the network with its adapter. It is changed in place and can no longer be trained.
            card: the adapter's description.
            precision: precision of the image encoder.
        """
        self.network = fuse(network)
        self.card = card
        self.precision: Precision = precision

    @property
    def legend(self) -> Legend:
        """Names and colours of the values in label maps."""
        return legend_of(self.card.classes)

    def predict(self, volume: Any, affine: NDArray | None = None, **options: Any) -> Any:
        """Segment a volume, and return its label map, of the same type as the input.

        Args:
            volume: a NumPy array with its affine, a nibabel or SimpleITK image, a MONAI ``MetaTensor``, or the path of
                a file or of a folder with one DICOM series.
            affine: matrix (4, 4) from voxel indices to millimetres in RAS+, for a NumPy array only.
            options: fields of ``PredictionOptions`` except ``probabilities``, such as ``flips="x"``.

        Returns:
            Label map as uint8 in the volume's axes: 0 for background, then 1, 2, … in the order of ``card.classes``. A path
            returns a NumPy array.

        Raises:
            FlapsamError: the input is not a volume, or does not have the adapter's number of modalities.
        """
        read = read_image(source_at(Path(volume))) if isinstance(volume, (str, Path)) else volume_of(volume, affine)
        return labels_like(self.segment(read, PredictionOptions(**options)).labels, volume)

    def segment(
        self,
        volume: Volume,
        options: PredictionOptions = PredictionOptions(),
        *,
        site: str = "",
        on_slices: Callable[[int, int], None] = lambda count, of: None,
    ) -> Prediction:
        """Segment a ``Volume``, with probabilities if requested.

        Args:
            volume: the image.
            options: optional steps beyond predicting every slice once.
            site: the volume's site, which matters where sites clip intensities differently.
            on_slices: called with the number of slices just done and the total.

        Raises:
            FlapsamError: the volume does not have the adapter's number of modalities, or there is no room for the result.
        """
        expected = self.card.samples.modalities
        if volume.modalities != expected:
            number = f"{volume.modalities} {'modality' if volume.modalities == 1 else 'modalities'}"
            raise FlapsamError(f"the image has {number}, but the adapter was trained on {expected}")
        return predict_volume(
            self.network,
            volume,
            self.card.samples,
            precision=self.precision,
            site=site,
            options=options,
            on_slices=on_slices,
        )


def load(
    path: str | Path,
    *,
    checkpoint: Checkpoint | None = None,
    device: str = "cpu",
    precision: Literal["fp32", "bf16", "fp16", "auto"] | None = "auto",
    weights: Checkpoint | None = None,
) -> Model:
    """Load the adapter that a run has trained.

    Args:
        path: folder of an adapter or of a run.
        checkpoint: the backbone's checkpoint, if the adapter needs one that neither ships nor was downloaded.
        device: ``cpu``, ``cuda``, ``mps`` or ``auto``.
        precision: precision of the image encoder. ``auto`` is ``bf16`` on a GPU that computes in it, ``fp16``
            on an older one, and ``fp32`` elsewhere.
        weights: former name of ``checkpoint``.

    Raises:
        FlapsamError: there is no adapter at ``path``, its backbone is missing or is another one, or the device or precision
            is unknown.
    """
    if precision not in (None, "auto", *OFFERED):
        raise FlapsamError(f"precision '{precision}' is unknown; choose {', '.join(OFFERED)} or auto")
    trained = find_trained(Path(path))
    torch_device = find_device(device)
    network, card = load_adapter(trained.folder, checkpoint or weights or trained.checkpoint)
    model = Model(network.to(torch_device), card)
    model.precision = usual_precision(torch_device) if precision in (None, "auto") else precision
    return model

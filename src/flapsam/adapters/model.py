"""A trained adapter, ready to segment: for programs in Python, and for ``flapsam predict``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from flapsam.adapters.store import AdapterCard, load_adapter
from flapsam.adapters.trained import find_trained
from flapsam.base.device import find_device
from flapsam.base.errors import FlapsamError
from flapsam.learning.inference import Precision, Prediction, PredictionOptions, fastest_precision, predict_volume
from flapsam.run.config import Checkpoint
from flapsam.sam import Sam, fuse
from flapsam.volumes import Legend, Volume, labels_like, legend_of, read_image, source_at, volume_of


class Model:
    """A network with its adapter merged into it, and how volumes become its samples."""

    def __init__(self, network: Sam, card: AdapterCard, precision: Precision = "fp32") -> None:
        """Take a network over.

        Args:
            network: with the adapter; it only predicts from now on.
            card: of the adapter.
            precision: of the image encoder.
        """
        self.network = fuse(network)
        self.card = card
        self.precision: Precision = precision

    @property
    def legend(self) -> Legend:
        """What the values of label maps stand for, with names and colours."""
        return legend_of(self.card.classes)

    def predict(self, volume: Any, affine: NDArray | None = None, **options: Any) -> Any:
        """Segment a volume; the label map comes back in the form that the volume was given in.

        Args:
            volume: a NumPy array with its affine, a nibabel or SimpleITK image, a MONAI ``MetaTensor``, or the path of
                a file or of a folder with one DICOM series.
            affine: (4, 4), from voxel index to millimetres in RAS+; of a NumPy array only.
            options: fields of ``PredictionOptions`` but ``probabilities``, such as ``flips="x"``.

        Returns:
            0 for background, 1, 2, … in the order of ``card.classes``, as uint8, in the volume's axes. For a path, a NumPy
            array.

        Raises:
            FlapsamError: it is no volume, or not of as many modalities as the adapter was trained on.
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
        """The same for a ``Volume``, with probabilities if they are asked for.

        Args:
            volume: the image.
            options: what is done beyond predicting every slice once.
            site: whose it is, where sites are clipped differently.
            on_slices: called with the number of slices just done, and of all.

        Raises:
            FlapsamError: as ``predict``.
        """
        wanted = self.card.samples.modalities
        if volume.modalities != wanted:
            raise FlapsamError(f"it has {volume.modalities} modalities, the adapter was trained on {wanted}")
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
    precision: Literal["fp32", "bf16", "fp16", "auto"] | None = None,
    weights: Checkpoint | None = None,
) -> Model:
    """Load what a run has trained.

    Args:
        path: folder of an adapter or of a run.
        checkpoint: the backbone's checkpoint, if the adapter needs one that neither ships nor was downloaded.
        device: ``cpu``, ``cuda``, ``mps`` or ``auto``.
        precision: of the image encoder; ``auto`` takes the fastest by a short measurement. If not given: ``fp32`` on a CPU,
            ``auto`` elsewhere.
        weights: the former name of ``checkpoint``.

    Raises:
        FlapsamError: there is no adapter, its backbone is missing or another, or there is no such device or precision.
    """
    if precision not in (None, "auto", *get_args(Precision)):
        raise FlapsamError(f"precision '{precision}' is unknown; choose {', '.join(get_args(Precision))} or auto")
    trained = find_trained(Path(path))
    place = find_device(device)
    network, card = load_adapter(trained.folder, checkpoint or weights or trained.checkpoint)
    model = Model(network.to(place), card)
    if precision is None:
        precision = "fp32" if place.type == "cpu" else "auto"
    model.precision = fastest_precision(model.network) if precision == "auto" else precision
    return model

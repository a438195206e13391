"""What a hospital tells about its test cases: summary figures, none over fewer patients than its minimum."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from flapsam.base.names import Name, Named

Count = Annotated[int, Field(ge=0, le=10**7)]
Value = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Change = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]


class Figures(BaseModel):
    """A measure over a site's patients."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patients: Count
    """Number of patients behind it, rounded."""
    mean: Value
    """Mean over the patients."""
    deviation: Value | None
    """Standard deviation over the patients; None with a single patient."""
    quartiles: Annotated[list[Value], Field(min_length=3, max_length=3)] | None = None
    """Quartiles over the patients, each a weighted mean of all values (Harrell & Davis 1982); None for few patients."""


class Differences(BaseModel):
    """Mean Dice of an adapter minus that of the first one, on the same cases."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    patients: Count
    mean: Change
    deviation: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None
    """Standard deviation over the patients; None with a single patient."""


class SiteScores(BaseModel):
    """Test scores of a site. Whatever fewer patients than the site's minimum stand behind is left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cases: Count
    """Number of test cases, rounded."""
    patients: Count
    measures: dict[str, Named[Figures]]
    """Measure → class or region → its figures."""
    mean: Figures | None
    """Mean Dice over the classes."""
    means: Named[Figures] = {}
    """Name of a mean → its Dice."""
    missed: Named[Count | None] = {}
    """Class or region → rounded number of patients in whom the prediction lacks it; None if it is too small to be told."""
    spurious: Named[Count | None] = {}
    difference: Differences | None = None
    """Difference from the first adapter of an evaluation of several."""

    def names(self) -> Iterator[Name]:
        """All classes, regions and means that are named."""
        for figures in (*self.measures.values(), self.means, self.missed, self.spurious):
            yield from figures

"""How far a model that is computed in another precision answers as in float32, and the promise that it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from keras_server.settings import Precision

SURE = 0.5  # a probability above which float32 is sure of its first label
SURER = 5  # of those that float32 is sure of, only a fifth as many may differ: 0.99 stay the same where 0.95 of all do
NEAR = 0.05  # of the spread of an output's values: by how much a row may change and still count as the same
GAIN = 1.2  # times float32's rows a second, under which another precision is not worth its differences

Compared = Literal["labels", "values"]


@dataclass(frozen=True)
class Agreement:
    """What was compared, on rows that no calibration has seen."""

    compared: Compared
    rows: int
    same: float  # share of the rows with the same first label, or with values changed by NEAR at most
    sure: int  # rows that float32 is sure of; of values none
    same_sure: float  # share of these
    mean_change: float  # of the probability of float32's first label, or of the values as a share of their spread
    largest_change: float

    def keeps(self, least: float) -> bool:
        """Return whether --min-agreement is kept."""
        rounding = 1e-9
        return self.same >= least - rounding and self.same_sure >= least_sure(least) - rounding

    def __str__(self) -> str:
        """Return it in words, to stand after "it gives"."""
        change = f"by {self.mean_change:.3f} on average and {self.largest_change:.3f} at most"
        if self.compared == "values":
            return f"nearly the same values for {self.same:.1%} of {self.rows} rows, changed {change} of their spread"
        of_sure = f" ({self.same_sure:.1%} of the {self.sure} that float32 is sure of)" if self.sure else ""
        return (
            f"the same first label for {self.same:.1%} of {self.rows} rows{of_sure}, whose probability changes {change}"
        )


@dataclass(frozen=True)
class Tested:
    """A precision that was held against float32 and may be served in its place."""

    precision: Precision
    agreement: Agreement
    gain: float  # times float32's rows a second, where it was tested
    calibrated: int = 0  # rows
    how: str = ""  # what was done to the model
    portable: bool = True  # whether it gives the same answers on processors that do not sum up bytes as VNNI does

    def __str__(self) -> str:
        """Return it as a sentence."""
        return f"In {self.precision} it gives {self.agreement}, and computes {self.gain:.1f} times as fast."


def least_sure(least: float) -> float:
    """Return the share of the rows that float32 is sure of which has to stay the same, where this one of all does."""
    return 1 - (1 - least) / SURER

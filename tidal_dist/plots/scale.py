"""Numbers as colours, and the bar that tells which is which. Sizes are in inches, y downwards."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tidal_dist.plots.canvas import INK, draw_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 2.4, 0.12
_STRONGEST = 0.8  # of the colour map, so that dark text can be read on it


@dataclass(frozen=True)
class Scale:
    """Colours of the numbers 0..`top`. `gamma` below 1 spreads small ones.

    Attributes:
        colour_map: its name in matplotlib. ticks: the numbers that the bar names.
    """

    colour_map: str
    top: float
    ticks: tuple[float, ...]
    gamma: float = 1.0

    @property
    def height(self) -> float:
        """Height of the bar with its ticks."""
        return 0.45

    def colours(self, values: np.ndarray) -> np.ndarray:
        """(..., 3) red, green and blue of `values` (...); what is above the top has the top's colour."""
        from matplotlib import colormaps

        return colormaps[self.colour_map](_STRONGEST * self._along(values))[..., :3]

    def _along(self, values: np.ndarray) -> np.ndarray:
        return np.clip(np.asarray(values) / self.top, 0.0, 1.0) ** self.gamma

    def draw(self, axes: "Axes", left: float, top: float, what: str) -> None:
        """Draw the bar."""
        along = np.linspace(0.0, 1.0, 256)
        image = self.colours(self.top * along ** (1 / self.gamma))[None]
        top += 0.06
        axes.imshow(image, extent=(left, left + _WIDTH, top + _HEIGHT, top), aspect="auto", zorder=1)
        for tick in self.ticks:
            x = left + _WIDTH * float(self._along(np.array(tick)))
            axes.plot([x, x], [top + _HEIGHT, top + _HEIGHT + 0.04], color=INK, linewidth=0.6)
            draw_text(axes, x, top + _HEIGHT + 0.11, f"{tick:g}", 6.5)
        draw_text(axes, left + _WIDTH + 0.15, top + _HEIGHT / 2, what, 7.5, ha="left")

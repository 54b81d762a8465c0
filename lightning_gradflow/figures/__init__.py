"""History -> pictures."""

from lightning_gradflow.figures.cells import MAX_COLUMNS, MAX_ROWS, Grid, column_after, grid, shorten
from lightning_gradflow.figures.colours import MISSING_COLOUR, NONFINITE_COLOUR, ZERO_COLOUR, Pixels, colour_map, limits
from lightning_gradflow.figures.picture import heatmap

__all__ = [
    "MAX_COLUMNS",
    "MAX_ROWS",
    "MISSING_COLOUR",
    "NONFINITE_COLOUR",
    "ZERO_COLOUR",
    "Grid",
    "Pixels",
    "colour_map",
    "column_after",
    "grid",
    "heatmap",
    "limits",
    "shorten",
]

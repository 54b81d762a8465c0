"""Rows of measurements and the bounded history they make."""

from lightning_gradflow.history.axis import Axis
from lightning_gradflow.history.history import History
from lightning_gradflow.history.rows import MAX_CALLS, Bools, Floats, Ints, Point, Row

__all__ = ["MAX_CALLS", "Axis", "Bools", "Floats", "History", "Ints", "Point", "Row"]

import numpy as np

from lightning_gradflow.history import Point
from lightning_gradflow.probes.dead_units import SilentUnits
from lightning_gradflow.probes.packing import unpack
from lightning_gradflow.probes.ranks import Topology


def test_an_activation_that_no_rank_ran_in_this_sample_has_no_numbers():
    """Ranks agree on names once: a branch that is not taken this time has zeros throughout."""
    point = Point("a.sigmoid", "a", "sigmoid")
    found = unpack({("gate", point): np.zeros(2)}, Topology(data=2), SilentUnits(3), 1.0)
    assert dict(found.points) == {}

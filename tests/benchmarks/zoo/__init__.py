"""A zoo of small trainings on real data, labelled sick or healthy by how they end.

Nothing in here knows the package under test, so that a label can't lean on what it is meant to judge.
``python -m tests.benchmarks.zoo.outcomes`` trains every case and shows that the labels hold.
"""

from .case import Case, halved, quiet_trainer
from .healthy import HEALTHY as _HEALTHY
from .sick import SICK as _SICK

SICK, HEALTHY = halved(_SICK, _HEALTHY)

__all__ = ["HEALTHY", "SICK", "Case", "quiet_trainer"]

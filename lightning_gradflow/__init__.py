"""Watches a PyTorch Lightning training and says when it does not learn, where, why, and what to write instead."""

from lightning_gradflow.callbacks.auto_mitigator import AutoMitigator
from lightning_gradflow.callbacks.grad_norm_logger import GradNormLogger
from lightning_gradflow.callbacks.plateau_detector import PlateauDetector
from lightning_gradflow.callbacks.saturation_monitor import SaturationMonitor
from lightning_gradflow.findings import (
    Action,
    DeadUnitsWarning,
    ExplodingGradientWarning,
    Finding,
    FindingKind,
    GradFlowWarning,
    LossMismatchWarning,
    LossPlateauWarning,
    MixedSamplesWarning,
    NoGradientWarning,
    NonfiniteGradientWarning,
    SaturatedActivationWarning,
    Severity,
    Suggestion,
    UpdateRatioWarning,
    VanishingGradientWarning,
)
from lightning_gradflow.gradflow import GradFlow
from lightning_gradflow.history import History

__version__ = "0.1.0"

__all__ = [
    "Action",
    "AutoMitigator",
    "DeadUnitsWarning",
    "ExplodingGradientWarning",
    "Finding",
    "FindingKind",
    "GradFlow",
    "GradFlowWarning",
    "GradNormLogger",
    "History",
    "LossMismatchWarning",
    "LossPlateauWarning",
    "MixedSamplesWarning",
    "NoGradientWarning",
    "NonfiniteGradientWarning",
    "PlateauDetector",
    "SaturatedActivationWarning",
    "SaturationMonitor",
    "Severity",
    "Suggestion",
    "UpdateRatioWarning",
    "VanishingGradientWarning",
]

"""The launches, each made once in a test run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from .launcher import RankError, launch_once
from .program import HAS_FSDP2
from .table import PROGRAM


@dataclass(frozen=True)
class Launched:
    """What the two ranks answered, and the folder that they wrote to."""

    ranks: list[Any]
    folder: Path


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str], Launched]:
    """Group -> its answers. To start two ranks takes seconds: the workers of pytest-xdist share one launch."""
    root = tmp_path_factory.getbasetemp()
    root = (root if worker_id == "master" else root.parent) / "ranks"
    root.mkdir(exist_ok=True)

    @cache
    def get(group: str) -> Launched:
        if group in ("spread", "crossed", "treated shards") and not HAS_FSDP2:
            pytest.skip("FSDP2 runs on the CPU from torch 2.7 on")
        folder = root / group
        folder.mkdir(exist_ok=True)
        try:
            return Launched(launch_once(root / f"{group}.json", PROGRAM, group, str(folder)), folder)
        except RankError as error:
            pytest.fail(str(error), pytrace=False)

    return get

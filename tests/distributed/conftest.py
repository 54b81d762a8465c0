"""The launches, each made once in a test run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock  # torch brings it along

from .launcher import RankError, launch
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
        if group in ("spread", "crossed") and not HAS_FSDP2:
            pytest.skip("FSDP2 runs on the CPU from torch 2.7 on")
        folder, answers = root / group, root / f"{group}.json"
        with FileLock(root / f"{group}.lock"):
            if not answers.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                try:
                    found: Any = launch(PROGRAM, group, str(folder))
                except RankError as error:
                    found = str(error)
                answers.write_text(json.dumps(found))
        found = json.loads(answers.read_text())
        if isinstance(found, str):
            pytest.fail(found, pytrace=False)
        return Launched(found, folder)

    return get

"""The two ranks, started once in a test run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from filelock import FileLock  # torch brings it along

from tests.distributed.launcher import RankError, launch


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> list[Any]:
    """What each of two ranks answered. To start them takes seconds: the workers of pytest-xdist share one launch."""
    root = tmp_path_factory.getbasetemp()
    file = (root if worker_id == "master" else root.parent) / "ranks_of_the_probes.json"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            try:
                found: Any = launch("tests.probes.ranks_program", timeout=120)
            except RankError as error:
                found = str(error)
            file.write_text(json.dumps(found))
    found = json.loads(file.read_text())
    if isinstance(found, str):
        pytest.fail(found, pytrace=False)
    return list(found)

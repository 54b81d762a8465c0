"""The two ranks, started once in a test run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launcher import RankError, launch_once


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> list[Any]:
    """What each of two ranks answered. To start them takes seconds: the workers of pytest-xdist share one launch."""
    root = tmp_path_factory.getbasetemp()
    file = (root if worker_id == "master" else root.parent) / "ranks_of_the_probes.json"
    try:
        return launch_once(file, "tests.probes.ranks_program", timeout=120)
    except RankError as error:
        pytest.fail(str(error), pytrace=False)

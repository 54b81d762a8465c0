"""Starts a program as several ranks and brings their answers back."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from filelock import FileLock  # torch brings it along

RANKS = 2
ROOT = Path(__file__).resolve().parents[2]


class RankError(Exception):
    """A rank failed, or they waited for each other."""


def launch(module: str, *arguments: str, ranks: int = RANKS, timeout: float = 240.0) -> list[Any]:
    """Runs ``python -m module *arguments`` as so many ranks.

    Lightning starts no processes of its own where it finds this environment.

    Args:
        module: prints one line of JSON at its end.
        arguments: the same for all ranks.
        ranks: how many.
        timeout: seconds after which all are killed.

    Returns:
        What each rank printed last, in order of ranks.

    Raises:
        RankError: if a rank failed or did not end in time, with what all wrote to stderr.
    """
    with ExitStack() as stack:
        processes, outputs, errors = [], [], []
        port = _free_port()
        for rank in range(ranks):
            # files and not pipes: a full pipe would stop a rank while another one is waited for
            outputs.append(stack.enter_context(tempfile.TemporaryFile()))
            errors.append(stack.enter_context(tempfile.TemporaryFile()))
            command = [sys.executable, "-m", module, *arguments]
            process = subprocess.Popen(
                command,
                stdout=outputs[-1],
                stderr=errors[-1],
                cwd=ROOT,
                env=os.environ | _environment(rank, ranks, port),
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        trouble = _wait(processes, timeout)
        if trouble:
            told = "\n".join(f"--- rank {rank} ---\n{_text(error)[-6000:]}" for rank, error in enumerate(errors))
            raise RankError(f"{' '.join([module, *arguments])}: {trouble}\n{told}")
        return [json.loads(_text(output).splitlines()[-1]) for output in outputs]


def launch_once(answers: Path, module: str, *arguments: str, timeout: float = 240.0) -> list[Any]:
    """The answers of a launch that the workers of pytest-xdist share: the first one makes it, the others read the file.

    Raises:
        RankError: as `launch`, for each of them.
    """
    with FileLock(answers.with_suffix(".lock")):
        if not answers.exists():
            try:
                found: Any = launch(module, *arguments, timeout=timeout)
            except RankError as error:
                found = str(error)
            answers.write_text(json.dumps(found))
    found = json.loads(answers.read_text())
    if isinstance(found, str):
        raise RankError(found)
    return list(found)


def _wait(ranks: list[subprocess.Popen[bytes]], timeout: float) -> str:
    """What went wrong, or nothing. A rank that fails leaves the others waiting: these are not waited for."""
    end = time.monotonic() + timeout
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            time.sleep(1.0)  # for the last words of the others
            break
        if time.monotonic() > end:
            return f"not ready after {timeout:g} s"
        time.sleep(0.05)
    failed = [f"rank {number} ended with {rank.poll()}" for number, rank in enumerate(ranks) if rank.poll() != 0]
    return ", ".join(failed)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1",
        "LIGHTNING_GRADFLOW_RAISE": "1",
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")

"""Reads an offline W&B run back: a LevelDB-style log of Record messages behind a header of 7 bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32768
_RECORD_HEADER = 7  # checksum (4), length (2), type (1)
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What stands in a `.wandb` file.

    Args:
        history: one dict for each row of the run's table, key -> parsed JSON.
        alerts: (title, text, level) of each alert.
        files: paths of the media, relative to the folder `files` of the run.
        config: the run's config, key -> parsed JSON.
        metrics: glob or name of each defined metric -> its step metric.
        folder: the folder of the run.
        has_ended: whether the record that closes a run was there.
    """

    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[tuple[str, str, str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    has_ended: bool = False

    @property
    def keys(self) -> set[str]:
        """The keys of all rows, without W&B's own."""
        return {key for row in self.history for key in row if not key.startswith("_")}

    def rows_with(self, key: str) -> list[dict[str, Any]]:
        """The rows that hold a key."""
        return [row for row in self.history if key in row]


def read_run(path: str | Path, patience: float = 20.0) -> OfflineRun:
    """Reads the one offline run at or below a path; call `wandb.finish()` before.

    `finish` may return a moment before W&B's own process has written the last block: so this waits for the record
    that says that the run has ended, `patience` seconds at most.
    """
    path = Path(path)
    logs = [path] if path.suffix == ".wandb" else sorted(path.rglob("run-*.wandb"))
    assert len(logs) == 1, f"one .wandb file expected, found {logs}"
    deadline = time.monotonic() + patience
    while True:
        run = OfflineRun(folder=logs[0].parent)
        for data in _records(logs[0].read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            _take(run, record)
        if run.has_ended:
            return run
        assert time.monotonic() < deadline, f"{logs[0]} holds no end of the run: was wandb.finish() called?"
        time.sleep(0.05)


def _take(run: OfflineRun, record: Any) -> None:
    match record.WhichOneof("record_type"):
        case "history":
            run.history.append(_nested(record.history.item))
        case "alert":
            run.alerts.append((record.alert.title, record.alert.text, record.alert.level))
        case "files":
            run.files += [item.path for item in record.files.files]
        case "config":
            run.config.update(_nested(record.config.update))
        case "run":
            run.config.update(_nested(record.run.config.update))
        case "exit":
            run.has_ended = True
        case "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric


def _nested(items: Any) -> dict[str, Any]:
    """A histogram comes as `[key, "values"]` and `[key, "bins"]`: dicts within dicts are put together again."""
    found: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        place = found
        for key in outer:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """The messages of a log: fragments in blocks of 32 KiB, joined."""
    assert data[:4] == b":W&B", "not a W&B log"
    at, parts = 7, []
    while at + _RECORD_HEADER <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < _RECORD_HEADER:  # the end of a block is filled up
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            return
        at += _RECORD_HEADER
        if at + length > len(data):  # still being written
            return
        parts.append(data[at : at + length])
        at += length
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []

#!/usr/bin/env python3
"""Sets this checkout up and runs it; needs nothing but Python.

usage:
  python3 dev.py example [--healthy] [--mitigate apply] ...   watch a network that does not learn
  python3 dev.py test [pytest arguments]                      run the tests
  python3 dev.py check                                        lint, format and types

Each command first makes the environment .venv beside this file, or brings it up to date; after that it is reused.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "gradflow-setup.txt"
MIN_PYTHON = (3, 10)
COMMANDS = ("example", "test", "check")


class SetupError(Exception):
    """What the person at the keyboard can put right; shown without a traceback."""


def parse(argv: list[str]) -> tuple[str, list[str]]:
    """The command, and the arguments that are handed on as they are.

    Raises:
        SetupError: if the command is missing or unknown, or `check` is given arguments.
    """
    if not argv or argv[0] not in COMMANDS:
        raise SetupError(f"command must be one of {', '.join(COMMANDS)}, got {argv[0] if argv else 'none'}")
    command, rest = argv[0], argv[1:]
    if command == "check" and rest:
        raise SetupError(f"check takes no arguments, got {' '.join(rest)}")
    return command, rest


def torch_pin(constraints: str) -> str:
    """The line of the constraints that names torch, such as `torch==2.13.0`.

    Raises:
        SetupError: if there is none.
    """
    found = re.search(r"^torch==[^\s;#]+", constraints, flags=re.MULTILINE)
    if found is None:
        raise SetupError("constraints.txt must pin torch, as in torch==2.13.0")
    return found.group()


def stamp(*parts: str) -> str:
    """A digest that changes when one of the parts does; it does not depend on how lines end."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.replace("\r\n", "\n").encode()
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def commands(command: str, args: list[str]) -> list[list[str]]:
    """What a command runs, one after the other, each to be put behind the environment's interpreter."""
    if command == "example":
        return [[str(Path("examples", "vanishing_digits.py")), *args]]
    if command == "test":
        return [["-m", "pytest", *args]]
    return [["-m", "ruff", "check", "."], ["-m", "ruff", "format", "--check", "."], ["-m", "mypy"]]


def interpreter() -> Path:
    """Where the environment's interpreter lies on this system."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(python: Path | str, *args: str) -> int:
    """Runs an interpreter in the root of the checkout and returns its exit code."""
    code = subprocess.run([str(python), *args], cwd=ROOT, check=False).returncode
    return code if code >= 0 else 128 - code


def ensure(what: str, python: Path | str, *args: str) -> None:
    """Runs one step of the set-up, which must succeed.

    Raises:
        SetupError: if it fails; its own output stands above.
    """
    if run(python, *args) != 0:
        raise SetupError(f"could not {what}; the reason stands above")


def set_up() -> Path:
    """Makes `.venv` or brings it up to date, and returns its interpreter.

    Raises:
        SetupError: if a step fails, or the environment that is there has a Python that is too old.
    """
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    # the editable install points at ROOT: a checkout that was moved is set up anew
    expected = stamp(str(ROOT), Path(__file__).read_text(encoding="utf-8"), pyproject, constraints)
    python = interpreter()
    if python.is_file() and STAMP.is_file() and STAMP.read_text(encoding="utf-8") == expected:
        return python

    print("Setting up .venv; the first time downloads PyTorch and takes some minutes.", flush=True)
    if not python.is_file():
        # --clear: a folder whose interpreter is gone, such as after an upgrade of Python, cannot be mended in place
        ensure("make .venv", sys.executable, "-m", "venv", "--clear", str(VENV))
    if run(python, "-c", f"import sys; sys.exit(sys.version_info < {MIN_PYTHON})") != 0:
        raise SetupError(f".venv must hold Python {_dotted(MIN_PYTHON)} or newer; remove it and try again")
    if run(python, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('pip') is None)") != 0:
        ensure("put pip into .venv", python, "-m", "ensurepip")
    pip = ["-m", "pip", "install", "-qq", "--no-input", "--disable-pip-version-check"]
    # 21.3 is the first pip that installs a checkout in place without a setup.py
    ensure("install torch", python, *pip, "pip>=21.3", torch_pin(constraints))
    ensure("install the package", python, *pip, "-e", ".[dev,examples]", "-c", "constraints.txt")
    STAMP.write_text(expected, encoding="utf-8")
    return python


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def main(argv: list[str]) -> int:
    """Runs a command line and returns its exit code."""
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        if sys.version_info < MIN_PYTHON:
            raise SetupError(f"Python must be {_dotted(MIN_PYTHON)} or newer, got {_dotted(sys.version_info[:3])}")
        command, args = parse(argv)
        python = set_up()
    except SetupError as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 2
    codes = [run(python, *line) for line in commands(command, args)]
    return max(codes)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)

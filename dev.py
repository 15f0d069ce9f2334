#!/usr/bin/env python3
"""Sets up an environment of its own and runs the example or the tests in it. Needs Python alone.

    python3 dev.py example            train a small GPT on eight emulated devices
    python3 dev.py test               ruff, mypy and pytest
    python3 dev.py lint               ruff and mypy
    python3 dev.py env                only the environment; prints its Python

Further arguments go to the example or to pytest: `python3 dev.py example --help`, `python3 dev.py test -k gpt`.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 11)
EXTRAS = {"example": "examples", "test": "test", "lint": "test", "env": "test"}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,  # --help after a command is for what the command runs
    )
    parser.add_argument("command", choices=sorted(EXTRAS))
    parser.add_argument(
        "--python", default=sys.executable, help="the interpreter to make the environment with; default: this one"
    )
    parser.add_argument("--jax", metavar="VERSION", help="a version of jax, or `newest`; default: what pip chooses")
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        parser.print_help()
        return 0
    options, rest = parser.parse_known_args()
    if rest and options.command in ("lint", "env"):
        parser.error("unknown arguments: " + " ".join(rest))

    python = make_env(options.python, options.jax, EXTRAS[options.command])
    if options.command == "env":
        print(python)
        return 0
    if options.command == "example":
        return run([python, "examples/train_lm.py", *rest])
    checks = lint_commands(python)
    if options.command == "test":
        checks.append(pytest_command(python, rest))
    return run_all(checks)


def make_env(base_python, jax, extra):
    """The Python of an environment with this package and its `extra`, made or completed if need be."""
    version = python_version(base_python)
    if version < OLDEST_PYTHON:
        wanted, found = ".".join(map(str, OLDEST_PYTHON)), ".".join(map(str, version))
        sys.exit(f"jaxpar needs Python {wanted} or later; {base_python} is {found}. Choose another with --python.")
    default = jax is None and os.path.realpath(base_python) == os.path.realpath(sys.executable)
    env = ROOT / (".venv" if default else ".venv-py{}.{}-jax-{}".format(version[0], version[1], jax or "any"))
    python = env / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    key = [str(version), jax, hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()]
    stamp = env / "jaxpar-env.json"
    made = json.loads(stamp.read_text()) if stamp.exists() else {"key": None, "extras": []}
    if made["key"] == key and extra in made["extras"]:
        return str(python)

    extras = sorted({extra, *(made["extras"] if made["key"] == key else [])})
    what = f"Python {'.'.join(map(str, version))}, jax {jax or 'any'}, extras {', '.join(extras)}"
    print(f"Setting up {env.name} with {what}: a minute or two ...", flush=True)
    start = time.time()
    if made["key"] != key:
        checked([base_python, "-m", "venv", "--clear", str(env)])
    pins = {None: [], "newest": ["--upgrade", "jax", "jaxlib"]}.get(jax, [f"jax=={jax}", f"jaxlib=={jax}"])
    checked([str(python), "-m", "pip", "install", "--quiet", *pins, "--editable", f".[{','.join(extras)}]"])
    stamp.write_text(json.dumps({"key": key, "extras": extras}))
    print(f"Set up in {time.time() - start:.0f} s.")
    return str(python)


def python_version(python):
    """The version of an interpreter, as three numbers."""
    code = "import sys; print(*sys.version_info[:3])"
    try:
        output = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{python} is not a Python that runs: {error}")
    return tuple(map(int, output.split()))


def lint_commands(python):
    """Style and types."""
    return [
        [python, "-m", "ruff", "check", "."],
        [python, "-m", "ruff", "format", "--check", "."],
        [python, "-m", "mypy"],
    ]


def pytest_command(python, rest):
    """All tests, on as many workers as there are cores, four at most; tests of one model share a worker."""
    workers = [] if any(arg.startswith(("-n", "--numprocesses", "--pdb")) for arg in rest) else ["-n", str(cores())]
    return [python, "-m", "pytest", *workers, "--dist", "loadgroup", *rest]


def cores():
    """How many workers the tests get: each one starts XLA with threads of its own."""
    return max(1, min(4, os.cpu_count() or 1))


def run(command):
    """Runs a command in the repository and returns its status."""
    print("$ " + " ".join(map(shlex.quote, command)), flush=True)
    return subprocess.run(command, cwd=ROOT).returncode


def checked(command):
    """Runs a command that must succeed."""
    status = run(command)
    if status:
        sys.exit(f"failed with status {status}: {' '.join(command)}")


def run_all(commands):
    """Runs all commands, also after a failure, and says which failed."""
    failed = [" ".join(command[2:4]) for command in commands if run(command)]
    print(f"FAILED: {'; '.join(failed)}" if failed else "All checks passed.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

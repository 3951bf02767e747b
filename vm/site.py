"""The host's own Python: its virtual environments, and the rendered site."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

from vm.image import CACHE, REPO
from vm.labvm import RUN
from vm.steps import run, step

SITE = REPO / "book/_build/html"


def environment(*lists: str) -> Path:
    """Return the bin directory of a virtual environment with these requirement files, made where there is none yet."""
    texts = b"".join((REPO / name).read_bytes() for name in (*lists, "constraints.txt"))
    digest = hashlib.sha256(texts + sys.version.encode()).hexdigest()[:12]
    place = CACHE / f"venv-{digest}"
    if not (place / "complete").exists():
        with step("Python environment of this machine"):
            shutil.rmtree(place, ignore_errors=True)
            log = RUN / "venv.log"
            run([sys.executable, "-m", "venv", place], log)
            wanted: list[str | Path] = [f"--requirement={REPO / name}" for name in lists]
            run([place / "bin/python", "-m", "pip", "install", "--quiet", *wanted], log)
            (place / "complete").touch()
    return place / "bin"


def build_site(bin_: Path | None = None) -> None:
    """Build the site strictly, any warning is an error, with the programs in `bin_` or an environment of its own."""
    bin_ = bin_ or environment("requirements.txt")
    with step("the site, strictly"):
        env = {**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'book/_ext'}"}
        strictly = ["-W", "-n", "--keep-going", "--path-output", str(REPO / "book")]
        log = RUN / "site.log"
        log.unlink(missing_ok=True)
        shutil.rmtree(SITE.parent, ignore_errors=True)  # pages of an older book would stay
        run([bin_ / "jupyter-book", "build", *strictly, REPO / "book"], log, env=env)

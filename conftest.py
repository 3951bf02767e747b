"""What every run of pytest needs, for tests/ as for book/: `pytest --nbval book/` alone does the right thing."""

import os

import pytest

pytest_plugins = ("tests.leaks",)
collect_ignore_glob = ["tests/lint/bad/*", "_build/*"]


# First of all: nbval checks its options in its own pytest_configure.
@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let kernels and children find labs, and give nbval the book's settings."""
    root = config.rootpath
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    os.environ.pop("SSH_CLIENT", None)  # a bash below sshd reads ~/.bashrc, and a lab's other users may not
    if getattr(config.option, "nbval", False):
        config.option.nbval_current_env = True
        config.option.nbval_cell_timeout = min(config.option.nbval_cell_timeout, 600)
        config.option.nbval_sanitize_with = config.option.nbval_sanitize_with or str(root / "book/nbval-sanitize.cfg")

"""What can go wrong, as one small tree; each error carries its facts as attributes.

::

    LabError
    ├── NotALab            this machine is not a lab: nothing was touched
    ├── BadInput           a value given to labs breaks a rule
    ├── Mismatch           content is not what its descriptor says: digest or size
    ├── RegistryError      a registry refused, or did not answer as the specification says
    ├── KernelError        a system call or a write to a kernel file failed (also an OSError)
    ├── ChildFailed        a forked child could not finish a step
    │   ├── CommandNotFound    no such command: a shell's 127
    │   └── NotExecutable      found, but it cannot be executed: a shell's 126
    ├── Timeout            a deadline passed
    └── ExerciseError      an exercise was called in a way that cannot be checked

Messages hold no pid, no random name and no directory, so that they read the same on every run;
those facts are in the attributes.
"""

from __future__ import annotations

import os


class LabError(Exception):
    """Base of every error that labs raises itself."""


class NotALab(LabError):
    """labs refuses to change this machine; ``found`` says why."""

    def __init__(self, found: str) -> None:
        self.found = found
        super().__init__(f"{found}; labs changes only a lab machine: start one with ./lab up")


class BadInput(LabError, ValueError):
    """``field`` was given ``value``, which breaks ``rule``."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        self.field, self.value, self.rule = field, value, rule
        super().__init__(f"{field}: {value!r}: {rule}")


class Mismatch(LabError):
    """The ``field`` (digest, size or diffID) of ``what`` was ``expected`` and is ``found``."""

    def __init__(self, what: str, field: str, expected: object, found: object) -> None:
        self.what, self.field, self.expected, self.found = what, field, expected, found
        super().__init__(f"{what}: {field} is {found}, not {expected}")


class RegistryError(LabError):
    """A registry answered ``step`` with ``status`` (0: with no answer at all) and the error ``code``."""

    def __init__(self, step: str, detail: str, status: int = 0, code: str = "") -> None:
        self.step, self.status, self.code = step, status, code
        super().__init__(f"{step}: {detail}")


class KernelError(LabError, OSError):
    """The kernel refused ``step`` (a system call, or "write FILE") with ``errno`` on ``path``."""

    def __init__(self, step: str, errno: int, path: str | None = None, value: str | None = None) -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.step, self.path, self.value = step, path, value

    def __str__(self) -> str:
        given = "" if self.value is None else f" {self.value!r}"
        return f"{self.step}{given}: {self.strerror}"


class ChildFailed(LabError):
    """A child stopped at ``step`` with ``errno`` (0: not a system call's failure) on ``path``."""

    def __init__(self, step: str, errno: int = 0, path: str | None = None, detail: str | None = None) -> None:
        self.step, self.errno, self.path = step, errno, path
        self.detail = detail or os.strerror(errno)
        super().__init__(f"{step}: {self.detail}")


class CommandNotFound(ChildFailed):
    """No file of that name on the path; ``code`` is the status a shell would give."""

    code = 127


class NotExecutable(ChildFailed):
    """The file is there and execve(2) refused it; ``code`` is the status a shell would give."""

    code = 126


class Timeout(LabError, TimeoutError):
    """``what`` did not happen within ``seconds``."""

    def __init__(self, what: str, seconds: float) -> None:
        self.what, self.seconds = what, seconds
        super().__init__(f"{what}: not within {seconds:g} s")


class ExerciseError(LabError):
    """An exercise's function got something that it cannot check."""

r"""A Dockerfile as data: stages of instructions, each with its line, its flags and its words.

The Dockerfile reference of Docker says what an instruction looks like; how lines are joined, words are
split and variables stand for their values follows what its parser does.  Nothing is carried out here, and
what labs.build does not carry out is refused by name and line.  Every mistake is a DockerfileError::

    Dockerfile:7: COPY: '--form=x': unknown flag; there are --from, --chown, --chmod

Words are kept as written, for the value of a variable is known only while building: there expand() and
words() put the values in.  parse() has already gone through every word that EXPANDED names, so that
neither of them can fail on one of its results, whatever the variables hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from itertools import chain
from typing import NamedTuple

from labs.errors import BadInput

# "Environment replacement": in these a variable stands for its value; in RUN, CMD, ENTRYPOINT the shell does that.
EXPANDED = ("ADD", "ARG", "COPY", "ENV", "EXPOSE", "FROM", "LABEL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR")
INSTRUCTIONS = ("ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN",
                "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR")
JSON_FORM = ("ADD", "CMD", "COPY", "ENTRYPOINT", "RUN", "SHELL", "VOLUME")
ONE_TEXT = ("CMD", "ENTRYPOINT", "RUN", "STOPSIGNAL", "USER", "WORKDIR")
PAIRS = ("ARG", "ENV", "LABEL")
HEREDOCS = ("ADD", "COPY", "RUN")
FLAGS = {"FROM": ("platform",), "RUN": ("mount",), "COPY": ("from", "chown", "chmod"), "ADD": ("chown", "chmod"),
         "HEALTHCHECK": ("interval", "timeout", "start-period", "start-interval", "retries")}
LEFT_OUT = {"RUN": ("network", "security", "device"), "COPY": ("link", "parents", "exclude"),
            "ADD": ("link", "exclude", "checksum", "keep-git-dir", "unpack")}
DIRECTIVES = ("syntax", "escape", "check")
NANOSECONDS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
MAX_NESTING = 50

_DIRECTIVE = re.compile(r"\s*#\s*([a-zA-Z][a-zA-Z0-9]*)\s*=(.*)")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_STAGE = re.compile(r"[a-z][a-z0-9_.-]*")
_VARIABLE = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_NAME = re.compile(r"\d+|[@*#?$!-]|\w+")
_OPERATOR = re.compile(r"}|:?[-+]")
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(tcp|udp))?", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|ms|s|m|h)")
_REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://|git@")
# What is quoted is passed over; << counts only where a word begins, so that $((1<<3)) is none.
_HEREDOC = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|\\."""
                      r"""|(?<!\S)[0-9]*<<(?P<tabs>-?)[ \t]*(?P<word>(?:'[^']*'|"[^"]*"|\\.|[^\s'"\\<>;&|()])+)""")


class DockerfileError(BadInput):
    """``instruction`` in ``line`` of ``file`` holds ``value``, which breaks ``rule``."""

    def __init__(self, file: str, line: int, instruction: str, value: object, rule: str) -> None:
        super().__init__(instruction, value, rule)
        self.file, self.line, self.instruction = file, line, instruction
        self.args = (f"{file}:{line}: {self}",)


class Heredoc(NamedTuple):
    """A here-document: ``expand`` is False where its name was quoted; with <<- the tabs are gone from ``text``."""

    name: str
    expand: bool
    text: str


class Secret(NamedTuple):
    """RUN --mount=type=secret: the secret ``id`` is a file at ``target`` while the command runs."""

    id: str
    target: str
    required: bool


class Instruction(NamedTuple):
    """One instruction.

    ``line`` is its first, from 1.  ``flags`` are without "--"; --mount stands in ``secrets``.  ``words`` are not yet
    expanded: of ENV and LABEL each is "name=value" (the old form too), of ARG "name" or "name=value", of COPY and ADD
    the sources and the destination without the here-documents; RUN, CMD, ENTRYPOINT in shell form, WORKDIR, USER and
    STOPSIGNAL have one, the text; of HEALTHCHECK the first is NONE or CMD.  ``exec_form``: they were a JSON array.
    ``text`` is all as written, continuation lines joined, here-documents below it.
    """

    line: int
    name: str
    flags: dict[str, str]
    words: tuple[str, ...]
    exec_form: bool
    heredocs: tuple[Heredoc, ...]
    secrets: tuple[Secret, ...]
    text: str


class Stage(NamedTuple):
    """FROM and what follows; ``base`` and ``platform`` not yet expanded (by the global ARGs), ``name`` lower case."""

    base: str
    name: str | None
    platform: str | None
    line: int
    instructions: tuple[Instruction, ...]


class Dockerfile(NamedTuple):
    """``args``: the ARGs before the first FROM.  ``escape``: what expand() and words() need, a backslash or not."""

    args: tuple[Instruction, ...]
    stages: tuple[Stage, ...]
    escape: str


def parse(text: str, file: str = "Dockerfile") -> Dockerfile:
    """Read a whole Dockerfile; ``file`` is only for messages.  DockerfileError: the first mistake."""
    lines = text.removeprefix("\ufeff").split("\n")
    for number, line in enumerate(lines, 1):
        if _NO_TEXT.search(line):
            raise DockerfileError(file, number, "text", line, "must be Unicode text without NUL")
    escape = _directives(lines, file)
    args: list[Instruction] = []
    stages: list[Stage] = []
    last = 1
    for instruction in _instructions(lines, escape, file):
        last = instruction.line
        with located(file, last, instruction.name):
            _place(instruction, args, stages)
    if not stages:
        raise DockerfileError(file, last, "FROM", "", "there is none in the file")
    return Dockerfile(tuple(args), tuple(stages), escape)


@contextmanager
def located(file: str, line: int, instruction: str) -> Iterator[None]:
    """Give a BadInput from inside its place: it becomes a DockerfileError."""
    try:
        yield
    except DockerfileError:
        raise
    except BadInput as error:
        raise DockerfileError(file, line, instruction, error.value, error.rule) from None


def command(instruction: Instruction) -> str:
    """The text for the shell of a RUN in shell form: of `RUN <<EOF` the document itself (it may begin with #!)."""
    text, documents = instruction.words[0], instruction.heredocs
    whole = _HEREDOC.fullmatch(text)
    if whole and whole["word"]:
        return documents[0].text
    return text + "".join(f"\n{document.text}{document.name}" for document in documents)


# --- what the builder asks when it knows the variables ---


def expand(text: str, variables: Mapping[str, str], escape: str = "\\", *, quotes: bool = True) -> str:
    """Put values in for $x ${x} ${x:-w} ${x:+w} ${x-w} ${x+w} and take quotes and escapes off.

    An unset variable is empty.  In single quotes nothing is special; an escape makes the next character plain, in
    double quotes only before " $ and itself.  ``quotes=False`` is for a here-document of COPY: quotes are plain there.
    """
    return "".join(piece for piece, _ in _Word(text, variables, escape, quotes).pieces())


def words(text: str, variables: Mapping[str, str], escape: str = "\\") -> list[str]:
    """Expand, then split at blanks, those in the values too, if they are not quoted.  Empty words are dropped."""
    pieces = _Word(text, variables, escape, quotes=True).pieces()
    marked = "".join(piece if quoted else re.sub(r"\s+", "\0", piece) for piece, quoted in pieces)
    return [word for word in marked.split("\0") if word]


def ports(given: Iterable[str]) -> list[str]:
    """EXPOSE: 80, 53/udp, 8000-8002 -> ["80/tcp", "53/udp", "8000/tcp", "8001/tcp", "8002/tcp"]."""
    single = []
    for port in given:
        found = _PORTS.fullmatch(port)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not found or not 1 <= first <= last <= 65535:
            raise BadInput("port", port, "must be a port (1 to 65535) or first-last, then /tcp, /udp or nothing")
        single += [f"{number}/{(found[3] or 'tcp').lower()}" for number in range(first, last + 1)]
    return single


def mode(text: str) -> int:
    """--chmod: permission bits in octal."""
    if not re.fullmatch("[0-7]{3,4}", text):
        raise BadInput("chmod", text, "must be three or four octal digits")
    return int(text, 8)


def local(source: str) -> str:
    """Give back a source of COPY or ADD that is a path; refuse an address (a URL, a git repository)."""
    if _REMOTE.match(source):
        raise BadInput("source", source, "must be a path: sources on the network are not carried out here")
    return source


def nanoseconds(duration: str) -> int:
    """--interval, --timeout and so on, as Go writes a duration (1m30s, 500ms), in the unit of the image's config."""
    found = _DURATION.findall(duration)
    length = int(sum(Decimal(number) * NANOSECONDS[unit] for number, unit in found))
    if duration != "0" and (not found or "".join(map("".join, found)) != duration or not 10**6 <= length < 1 << 63):
        raise BadInput("duration", duration, "must be 0 or a duration of at least 1ms, like 30s or 1m30s")
    return length


def retries(text: str) -> int:
    """--retries: how many failures in a row make a container unhealthy; 0: the engine's default."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise BadInput("retries", text, "must be a whole number, 0 or more")
    return int(text)


class _Word:
    """One walk over a word: pieces of text, each with whether it was quoted."""

    def __init__(self, text: str, variables: Mapping[str, str], escape: str, quotes: bool) -> None:
        self.text, self.variables, self.escape, self.quotes = text, variables, escape, quotes
        self.at = self.nesting = 0

    def take(self) -> str:
        """Take the next character, "" at the end."""
        self.at += 1
        return self.text[self.at - 1:self.at]

    def bad(self, rule: str) -> BadInput:
        return BadInput("word", self.text, rule)

    def pieces(self, stop: str = "") -> list[tuple[str, bool]]:
        """Walk up to ``stop``: the end, the } of a ${, or the second double quote."""
        found: list[tuple[str, bool]] = []
        inside = stop == '"'
        while (char := self.take()) != stop:
            if not char:
                raise self.bad(f"{'a double quote' if inside else 'a ${'} is not closed")
            if char == "$":
                found.append((self.dollar(), inside))
            elif char == self.escape and (not inside or self.text[self.at:self.at + 1] in ('"', "$", self.escape)):
                found.append((self.take(), True))
            elif self.quotes and not inside and char in ("'", '"'):
                found.append((self.quoted(char), True))
            else:
                found.append((char, inside))
        return found

    def quoted(self, quote: str) -> str:
        if quote == '"':
            return "".join(piece for piece, _ in self.pieces(quote))
        inside, closed, _ = self.text[self.at:].partition(quote)
        if not closed:
            raise self.bad("a single quote is not closed")
        self.at += len(inside) + 1
        return inside

    def dollar(self) -> str:
        braces = self.text[self.at:self.at + 1] == "{"
        name = _NAME.match(self.text, self.at + braces)
        if name:
            self.at = name.end()
        if not braces:
            return self.variables.get(name[0], "") if name else "$"
        operator = _OPERATOR.match(self.text, self.at)
        if not name or not operator:
            raise self.bad("must be ${x}, ${x:-word}, ${x:+word}, ${x-word} or ${x+word}")
        self.at = operator.end()
        value = self.variables.get(name[0])
        return value or "" if operator[0] == "}" else self.either(value, operator[0])

    def either(self, value: str | None, operator: str) -> str:
        """Choose between the value and the word after - or +; with a colon an empty value counts as none."""
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise self.bad(f"more than {MAX_NESTING} ${{ within each other")
        word = "".join(piece for piece, _ in self.pieces("}"))
        self.nesting -= 1
        is_set = bool(value) if operator[0] == ":" else value is not None
        if operator[-1] == "-":
            return value or "" if is_set else word
        return word if is_set else ""


# --- lines ---


def _directives(lines: list[str], file: str) -> str:
    """The comments at the very top, each once; all that changes anything is the escape character."""
    seen: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        found = _DIRECTIVE.match(line)
        key, value = (found[1].lower(), found[2].strip()) if found else ("", "")
        if key not in DIRECTIVES or not value:
            break
        if key in seen:
            raise DockerfileError(file, number, key, value, "this parser directive is given twice")
        if key == "escape" and value not in ("\\", "`"):
            raise DockerfileError(file, number, key, value, "must be a backslash or a backquote")
        seen[key] = value
    return seen.get("escape", "\\")


def _instructions(lines: list[str], escape: str, file: str) -> Iterator[Instruction]:
    numbered = enumerate(lines, 1)
    rest = (line for _, line in numbered)
    for number, line in numbered:
        written = "" if _comment(line) else _join(line, rest, escape)
        if written:
            name = written.split(None, 1)[0].upper()
            with located(file, number, name if name.isprintable() else ascii(name)[1:-1]):
                instruction = _instruction(number, name, written, rest, escape)
            yield instruction


def _comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def _join(first: str, rest: Iterator[str], escape: str) -> str:
    """A line and those it is continued on, without the comments and blank lines between them."""
    goes_on = re.compile(rf"(?<!{re.escape(escape)}){re.escape(escape)}[ \t]*$")
    parts: list[str] = []
    for line in chain([first], rest):
        if parts and (_comment(line) or not line.strip()):
            continue
        part, more = goes_on.subn("", line.rstrip("\r"))
        parts.append(part)
        if not more:
            break
    return "".join(parts).strip()


def _heredocs(found: list[re.Match[str]], rest: Iterator[str]) -> tuple[tuple[Heredoc, ...], str]:
    """Read the documents whose << were found; also all that was read."""
    documents, written = [], ""
    for match in found:
        name, body = re.sub(r"['\"]|\\(.)", r"\1", match["word"]), list[str]()
        for line in (line.lstrip("\t") if match["tabs"] else line for line in rest):
            if line.rstrip("\r") == name:
                break
            body.append(line + "\n")
        else:
            raise BadInput("here-document", match[0], f"no line {name!r} ends this here-document")
        documents.append(Heredoc(name, not re.search(r"['\"\\]", match["word"]), "".join(body)))
        written += f"\n{documents[-1].text}{name}"
    return tuple(documents), written


# --- instructions ---


def _place(instruction: Instruction, args: list[Instruction], stages: list[Stage]) -> None:
    if instruction.name == "FROM":
        stages.append(_stage(instruction, [stage.name for stage in stages]))
    elif stages:
        stages[-1] = stages[-1]._replace(instructions=(*stages[-1].instructions, instruction))
    elif instruction.name == "ARG":
        args.append(instruction)
    else:
        raise BadInput(instruction.name, instruction.text, "stands before the first FROM, where only ARG may")


def _stage(instruction: Instruction, taken: list[str | None]) -> Stage:
    base, *rest = instruction.words
    if rest and (len(rest) != 2 or rest[0].upper() != "AS"):
        raise BadInput("FROM", " ".join(instruction.words), "must be an image, or an image AS name")
    name = rest[1].lower() if rest else None
    if name and not _STAGE.fullmatch(name):
        raise BadInput("FROM", rest[1], "the name of a stage is a letter, then letters, digits, _ . and -")
    if name and name in taken:
        raise BadInput("FROM", rest[1], "an earlier stage has this name")
    return Stage(base, name, instruction.flags.get("platform"), instruction.line, ())


def _instruction(number: int, name: str, written: str, rest: Iterator[str], escape: str) -> Instruction:
    arguments = "".join(written.split(None, 1)[1:])
    if name not in INSTRUCTIONS:
        why = "not carried out here" if name in ("ONBUILD", "MAINTAINER") else "no such instruction"
        raise BadInput(name, arguments, f"{why}; there are {', '.join(INSTRUCTIONS)}")
    given, arguments = _flags(arguments, escape)
    flags, secrets = _check_flags(name, given, escape)
    found = [match for match in _HEREDOC.finditer(arguments) if match["word"]] if name in HEREDOCS else []
    documents, below = _heredocs(found, rest)
    if documents and name != "RUN":
        arguments = _without(found, arguments, documents)
    if not arguments:
        raise BadInput(name, arguments, "needs an argument")
    words, exec_form = _words(name, arguments, escape)
    instruction = Instruction(number, name, flags, words, exec_form, documents, secrets, written + below)
    _check_words(instruction, escape)
    return instruction


def _flags(arguments: str, escape: str) -> tuple[list[str], str]:
    """Split off the words that begin with --, up to the first that does not."""
    flags: list[str] = []
    while arguments.startswith("--"):
        flags.append(_split(arguments, escape)[0])
        arguments = arguments[len(flags[-1]):].lstrip()
    return flags, arguments


def _check_flags(name: str, given: list[str], escape: str) -> tuple[dict[str, str], tuple[Secret, ...]]:
    flags: dict[str, str] = {}
    secrets: list[Secret] = []
    known = FLAGS.get(name, ())
    for word in given:
        flag, _, value = word[2:].partition("=")
        plain = expand(value, {}, escape)
        if flag not in known:
            why = "this flag is not carried out here" if flag in LEFT_OUT.get(name, ()) else "unknown flag"
            raise BadInput(name, word, f"{why}; there are {', '.join(f'--{flag}' for flag in known) or 'none'}")
        if not value or flag in flags:
            raise BadInput(name, word, "this flag is given twice" if value else "this flag needs a value")
        if flag == "mount":
            secrets.append(_secret(plain))
        else:
            flags[flag] = value if "$" in value else plain
        if flag in FLAG_RULES and not ("$" in value and flag == "chmod"):
            FLAG_RULES[flag](plain)
    return flags, tuple(secrets)


def _secret(value: str) -> Secret:
    """The value of --mount: type=secret, id, target and required."""
    options = {key: given for key, _, given in (option.partition("=") for option in value.split(","))}
    if options.pop("type", "bind") != "secret" or options.keys() - {"id", "target", "required"}:
        raise BadInput("mount", value, "only type=secret, with id, target and required, is carried out here")
    name, required = options.get("id", ""), options.get("required", "false")
    target = options.get("target", f"/run/secrets/{name}")
    if not name or "/" in name or not target.startswith("/") or required not in ("", "true", "false"):
        raise BadInput("mount", value, "a secret has an id without /, an absolute target; required is true or false")
    return Secret(name, target, required != "false")


def _without(found: list[re.Match[str]], arguments: str, documents: tuple[Heredoc, ...]) -> str:
    """The words of COPY and ADD that are no here-document; the names of those become file names."""
    for document in documents:
        if "/" in document.name or document.name in ("", ".", ".."):
            raise BadInput("here-document", document.name, "the name of this here-document must be a file name")
    if not arguments[found[-1].end():].strip():
        raise BadInput("here-document", found[-1][0], "the destination cannot be a here-document")
    for match in reversed(found):
        arguments = arguments[:match.start()] + arguments[match.end():]
    return arguments.strip()


def _check_words(instruction: Instruction, escape: str) -> None:
    name, values = instruction.name, list(instruction.words)
    if name in PAIRS:
        values = [part for pair in values for part in pair.split("=", 1)]
    if name in EXPANDED:
        values = [expand(value, {}, escape) for value in values]
    if name in ("COPY", "ADD"):
        for document in instruction.heredocs:
            expand(document.text if document.expand else "", {}, quotes=False)
        if len(values) + len(instruction.heredocs) < 2:
            raise BadInput(name, " ".join(values), "needs at least one source and a destination")
        for source in values[:-1]:
            local(source)
    if name == "EXPOSE":
        ports(expand(word, {}, escape) for word in instruction.words if "$" not in word)
    if (name == "RUN" and not values) or (name in ("ADD", "COPY", "VOLUME") and not all(instruction.words or [""])):
        raise BadInput(name, "", "must not be empty")
    if name == "HEALTHCHECK" and values == ["NONE"] and instruction.flags:
        raise BadInput(name, "NONE", "takes no flags")


# --- forms: the text after the flags -> words, and whether they were a JSON array ---


def _words(name: str, arguments: str, escape: str) -> tuple[tuple[str, ...], bool]:
    array = _json(arguments) if name in JSON_FORM else None
    if name == "SHELL" and not array:
        raise BadInput(name, arguments, 'must be a JSON array of one text or more, like ["/bin/sh", "-c"]')
    if name == "HEALTHCHECK":
        return _health(arguments, escape)
    if array is not None:
        return array, True
    if name in PAIRS:
        return (_names if name == "ARG" else _pairs)(arguments, escape), False
    return ((arguments,) if name in ONE_TEXT else tuple(arguments.split())), False


def _json(arguments: str) -> tuple[str, ...] | None:
    """The words of the JSON form; None where it is no JSON array: Docker then takes the text as it is."""
    if not arguments.startswith("["):
        return None
    try:
        array = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    if not all(isinstance(word, str) and not _NO_TEXT.search(word) for word in array):
        raise BadInput("arguments", arguments, "a JSON array must hold texts only, without NUL")
    return tuple(array)


def _split(arguments: str, escape: str) -> list[str]:
    """Split at blanks that are not quoted; the quotes stay.  An open quote reaches to the end."""
    mark = re.escape(escape)
    return re.findall(rf"""(?:'[^']*(?:'|\Z)|"(?:{mark}.|[^"{mark}])*(?:"|{mark}?\Z)|{mark}.?|[^\s'"{mark}])+""",
                      arguments)


def _pairs(arguments: str, escape: str) -> tuple[str, ...]:
    """Take name=value ..., or the old form, a name, a blank and the value: the first word tells them apart."""
    pairs = _split(arguments, escape)
    if "=" not in pairs[0]:
        name, *value = arguments.split(None, 1)
        pairs = [f"{name}={value[0]}"] if value else [name]
    for pair in pairs:
        if pair.find("=") < 1:
            raise BadInput("arguments", pair, "must be name=value")
    return tuple(pairs)


def _names(arguments: str, escape: str) -> tuple[str, ...]:
    pairs = tuple(_split(arguments, escape))
    for pair in pairs:
        if not _VARIABLE.fullmatch(pair.partition("=")[0]):
            raise BadInput("arguments", pair, "must be name or name=value, with a name of letters, digits and _")
    return pairs


def _health(arguments: str, escape: str) -> tuple[tuple[str, ...], bool]:
    kind, *rest = arguments.split(None, 1)
    if kind.upper() == "NONE" and not rest:
        return ("NONE",), False
    words, exec_form = _words("CMD", "".join(rest), escape)
    if kind.upper() != "CMD" or not words or not words[0]:
        raise BadInput("arguments", arguments, "must be NONE, or CMD and a command")
    return ("CMD", *words), exec_form


FLAG_RULES: dict[str, Callable[[str], int]] = {
    "chmod": mode, "interval": nanoseconds, "timeout": nanoseconds, "start-period": nanoseconds,
    "start-interval": nanoseconds, "retries": retries,
}

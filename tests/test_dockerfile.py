r"""labs.dockerfile: tables of good and bad snippets; values compared with buildah's, Docker's, sh's and shlex's."""

import json
import shlex
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labs import dockerfile
from labs.dockerfile import DockerfileError, Heredoc, Secret
from labs.errors import BadInput

FEW = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def one(text):
    """The only instruction after a FROM."""
    (stage,) = dockerfile.parse(f"FROM scratch\n{text}").stages
    (instruction,) = stage.instructions
    return instruction


# --- what is right ---

# What is written; the words; what else differs from no flags, shell form, no here-documents, no secrets.
GOOD = [
    ("RUN true", ["true"], {}),
    ("run  echo  a   b ", ["echo  a   b"], {}),
    ("\t RUN true", ["true"], {}),
    ('RUN ["a", "b c"]', ["a", "b c"], {"exec_form": True}),
    ('RUN [ "a" ,"\\u00e9" ]', ["a", "é"], {"exec_form": True}),
    ("RUN ['a']", ["['a']"], {}),
    ("RUN [ -f /x ] && true", ["[ -f /x ] && true"], {}),
    ('RUN ["a", "b"', ['["a", "b"'], {}),
    ("RUN " + "[" * 100_000, ["[" * 100_000], {}),
    ("RUN echo it's $x ${", ["echo it's $x ${"], {}),
    ("RUN a \\\n  b", ["a   b"], {}),
    ("RUN a \\\n# comment\n  # another\n\n \t\n  b", ["a   b"], {}),
    ("RUN a \\  \nb", ["a b"], {}),
    ("RUN a\\", ["a"], {}),
    ("RUN a \\\r\n b\r\n", ["a  b"], {}),
    ("RUN a # b", ["a # b"], {}),
    ("\\\nRUN a", ["a"], {}),
    ("RUN echo $((1<<3))", ["echo $((1<<3))"], {}),
    ("RUN cat <<<word", ["cat <<<word"], {}),
    ("RUN echo '<<a' \"b <<c\" \\<<d", ["echo '<<a' \"b <<c\" \\<<d"], {}),
    ("RUN <<EOF\na\n b\nEOF", ["<<EOF"], {"heredocs": (Heredoc("EOF", True, "a\n b\n"),)}),
    ("RUN <<'EOF'\n#!/bin/x\n$y\nEOF", ["<<'EOF'"], {"heredocs": (Heredoc("EOF", False, "#!/bin/x\n$y\n"),)}),
    ('RUN <<E"O"F\nEOF', ['<<E"O"F'], {"heredocs": (Heredoc("EOF", False, ""),)}),
    ("RUN <<-EOF\n\ta\n\t\t b\n\tEOF", ["<<-EOF"], {"heredocs": (Heredoc("EOF", True, "a\n b\n"),)}),
    ("RUN <<EOF\n\tEOF\n EOF\n# no comment\nEOF", ["<<EOF"],
     {"heredocs": (Heredoc("EOF", True, "\tEOF\n EOF\n# no comment\n"),)}),
    ("RUN a << A >f; b 3<<B\n1\nA\n2\\\nB", ["a << A >f; b 3<<B"],
     {"heredocs": (Heredoc("A", True, "1\n"), Heredoc("B", True, "2\\\n"))}),
    ("RUN cat \\\n <<A\n1\nA", ["cat  <<A"], {"heredocs": (Heredoc("A", True, "1\n"),)}),
    ("RUN --mount=type=secret,id=k cat /run/secrets/k", ["cat /run/secrets/k"],
     {"secrets": (Secret("k", "/run/secrets/k", False),)}),
    ("RUN --mount=type=secret,id=a,target=/x,required=true --mount=id=b,type=secret,required \\\n y", ["y"],
     {"secrets": (Secret("a", "/x", True), Secret("b", "/run/secrets/b", True))}),
    ("COPY a b", ["a", "b"], {}),
    ("COPY a $x/b* /c/", ["a", "$x/b*", "/c/"], {}),
    ('COPY ["a b", "c"]', ["a b", "c"], {"exec_form": True}),
    ("COPY --from=0 --chown=1:$g --chmod=0755 a b", ["a", "b"],
     {"flags": {"from": "0", "chown": "1:$g", "chmod": "0755"}}),
    ('COPY --chown="a:b" --chmod=$m a b', ["a", "b"], {"flags": {"chown": "a:b", "chmod": "$m"}}),
    ("COPY <<a.txt /d", ["/d"], {"heredocs": (Heredoc("a.txt", True, "A $x\n"),)}),
    ("COPY x <<a.txt <<'b' /d/", ["x", "/d/"],
     {"heredocs": (Heredoc("a.txt", True, "A $x\n"), Heredoc("b", False, "${\n"))}),
    ("ADD --chown=1 a.tar b /c/", ["a.tar", "b", "/c/"], {"flags": {"chown": "1"}}),
    ("ENV a=1", ["a=1"], {}),
    ("ENV a=1 b='2 3' \\\n c=\"4 $a\" d=5\\ 6", ["a=1", "b='2 3'", 'c="4 $a"', "d=5\\ 6"], {}),
    ("ENV a 1  2", ["a=1  2"], {}),
    ("ENV a b=c", ["a=b=c"], {}),
    ("ENV a=", ["a="], {}),
    ("LABEL a.b=1 \"c d\"='e'", ["a.b=1", "\"c d\"='e'"], {}),
    ("LABEL a b c", ["a=b c"], {}),
    ("ARG a", ["a"], {}),
    ("ARG a=1 b c='x y'", ["a=1", "b", "c='x y'"], {}),
    ("WORKDIR /a b", ["/a b"], {}),
    ("USER $u:$g", ["$u:$g"], {}),
    ("STOPSIGNAL SIGQUIT", ["SIGQUIT"], {}),
    ("CMD a | b", ["a | b"], {}),
    ('cmd ["a"]', ["a"], {"exec_form": True}),
    ("CMD []", [], {"exec_form": True}),
    ('ENTRYPOINT ["a", "$x"]', ["a", "$x"], {"exec_form": True}),
    ("ENTRYPOINT exec a", ["exec a"], {}),
    ("EXPOSE 80 443/tcp 53/UDP 8000-8010 $p", ["80", "443/tcp", "53/UDP", "8000-8010", "$p"], {}),
    ("VOLUME /a $b", ["/a", "$b"], {}),
    ('VOLUME ["/a b"]', ["/a b"], {"exec_form": True}),
    ("HEALTHCHECK none", ["NONE"], {}),
    ("HEALTHCHECK --interval=1m30s --retries=3 cmd a  b", ["CMD", "a  b"],
     {"flags": {"interval": "1m30s", "retries": "3"}}),
    ('HEALTHCHECK --timeout=0 --start-period=.5s --start-interval=100ms \\\n CMD ["a"]', ["CMD", "a"],
     {"exec_form": True, "flags": {"timeout": "0", "start-period": ".5s", "start-interval": "100ms"}}),
    ('SHELL ["/bin/sh", "-ec"]', ["/bin/sh", "-ec"], {"exec_form": True}),
]


@pytest.mark.parametrize(("text", "words", "others"), GOOD, ids=[text[:40] for text, *_ in GOOD])
def test_good(text, words, others):
    text += "\nA $x\na.txt\n${\nb" if "COPY x <<" in text else "\nA $x\na.txt" if "COPY <<" in text else ""
    found = one(text)
    nothing = {"flags": {}, "exec_form": False, "heredocs": (), "secrets": ()}
    assert found._asdict() == nothing | others | {
        "line": 2, "name": text.lstrip("\\\n\t ").split()[0].upper(), "words": tuple(words), "text": found.text}


def test_an_instruction_keeps_its_text_and_its_line():
    text = "# a comment\n\nFROM a\n\nrun  x \\\n\n # c\n  <<E\n\tb\nE\n\n  CMD c\n"
    first, second = dockerfile.parse(text).stages[0].instructions
    assert (first.line, first.name, first.text) == (5, "RUN", "run  x   <<E\n\tb\nE")
    assert (second.line, second.name, second.text) == (12, "CMD", "CMD c")


def test_stages_and_the_args_before_them():
    found = dockerfile.parse(
        "ARG V=1\nARG W\nFROM a:${V} as One\nRUN x\nFROM --platform=$P b AS two-2.x\nFROM one\nARG V\n")
    assert [(arg.line, arg.words) for arg in found.args] == [(1, ("V=1",)), (2, ("W",))]
    assert [stage[:4] for stage in found.stages] == [
        ("a:${V}", "one", None, 3), ("b", "two-2.x", "$P", 5), ("one", None, None, 6)]
    assert [[i.name for i in stage.instructions] for stage in found.stages] == [["RUN"], [], ["ARG"]]


@pytest.mark.parametrize("top", ["# syntax=docker/dockerfile:1\n#check=skip=all\n", "\ufeff", "\n\n# escape is fine\n"])
def test_what_may_stand_at_the_top(top):
    found = dockerfile.parse(top + "FROM a\nRUN b \\\n c\n")
    assert (found.escape, found.stages[0].instructions[0].words) == ("\\", ("b  c",))


def test_another_escape_character():
    found = dockerfile.parse("# escape=`\nFROM a\nENV a=b` c `\n d=\\x\n")
    (env,) = found.stages[0].instructions
    assert (found.escape, env.words) == ("`", ("a=b` c", "d=\\x"))
    assert [dockerfile.expand(word, {}, found.escape) for word in env.words] == ["a=b c", "d=\\x"]
    found = dockerfile.parse("# escape=`\nFROM a\nCOPY --from=b`'c\\d e f\n")
    assert found.stages[0].instructions[0].flags == {"from": "b'c\\d"}


@pytest.mark.parametrize("before", ["# a comment\n", "\n", "# other=x\n", "FROM x\n"])
def test_a_directive_counts_only_at_the_very_top(before):
    assert dockerfile.parse(f"{before}# escape=`\nFROM a\n").escape == "\\"


# --- what is wrong ---

THERE_ARE = ("there are ADD, ARG, CMD, COPY, ENTRYPOINT, ENV, EXPOSE, FROM, HEALTHCHECK, LABEL, RUN, SHELL, "
             "STOPSIGNAL, USER, VOLUME, WORKDIR")
SECRET = "a secret has an id without /, an absolute target; required is true or false"
MOUNT = "only type=secret, with id, target and required, is carried out here"
VARIABLE = "must be ${x}, ${x:-word}, ${x:+word}, ${x-word} or ${x+word}"
DURATION = "must be 0 or a duration of at least 1ms, like 30s or 1m30s"
PORT = "must be a port (1 to 65535) or first-last, then /tcp, /udp or nothing"
STAGE = "the name of a stage is a letter, then letters, digits, _ . and -"
NO_PATH = "must be a path: sources on the network are not carried out here"
NAME = "must be name or name=value, with a name of letters, digits and _"
ARRAY = 'must be a JSON array of one text or more, like ["/bin/sh", "-c"]'
OF_COPY = "there are --from, --chown, --chmod"
OF_HEALTHCHECK = "there are --interval, --timeout, --start-period, --start-interval, --retries"
HEALTH = "must be NONE, or CMD and a command"

# The whole file; the message without the name of the file.
BAD = [
    ("", "1: FROM: '': there is none in the file"),
    ("\n# only a comment\n", "1: FROM: '': there is none in the file"),
    ("ARG a\n\nARG b", "3: FROM: '': there is none in the file"),
    ("RUN a", "1: RUN: 'RUN a': stands before the first FROM, where only ARG may"),
    ("ARG a\nENV a=b\nFROM x", "2: ENV: 'ENV a=b': stands before the first FROM, where only ARG may"),
    ("FROM", "1: FROM: '': needs an argument"),
    ("FROM a b", "1: FROM: 'a b': must be an image, or an image AS name"),
    ("FROM a to b", "1: FROM: 'a to b': must be an image, or an image AS name"),
    ("FROM a AS", "1: FROM: 'a AS': must be an image, or an image AS name"),
    ("FROM a AS 1b", f"1: FROM: '1b': {STAGE}"),
    ("FROM a AS b/c", f"1: FROM: 'b/c': {STAGE}"),
    ("FROM a AS b\nFROM c AS B", "2: FROM: 'B': an earlier stage has this name"),
    ("FROM a:${x", f"1: FROM: 'a:${{x': {VARIABLE}"),
    ("FROM --from=x a", "1: FROM: '--from=x': unknown flag; there are --platform"),
    ("FRM a", f"1: FRM: 'a': no such instruction; {THERE_ARE}"),
    ("FROM a\n\nrum b", f"3: RUM: 'b': no such instruction; {THERE_ARE}"),
    ("FROM a\n\x1b[31mRUN b", f"2: \\x1b[31MRUN: 'b': no such instruction; {THERE_ARE}"),
    ("FROM a\nONBUILD RUN b", f"2: ONBUILD: 'RUN b': not carried out here; {THERE_ARE}"),
    ("FROM a\nMAINTAINER b", f"2: MAINTAINER: 'b': not carried out here; {THERE_ARE}"),
    ("# escape=x\nFROM a", "1: escape: 'x': must be a backslash or a backquote"),
    ("# syntax=a\n# syntax=b\nFROM a", "2: syntax: 'b': this parser directive is given twice"),
    ("FROM a\nRUN b\0", "2: text: 'RUN b\\x00': must be Unicode text without NUL"),
    ("FROM a\nRUN \udc80", "2: text: 'RUN \\udc80': must be Unicode text without NUL"),
    ("FROM a\nRUN", "2: RUN: '': needs an argument"),
    ("FROM a\nRUN []", "2: RUN: '': must not be empty"),
    ('FROM a\nRUN ["b", 1]', "2: RUN: '[\"b\", 1]': a JSON array must hold texts only, without NUL"),
    ('FROM a\nCMD ["\\u0000"]', "2: CMD: '[\"\\\\u0000\"]': a JSON array must hold texts only, without NUL"),
    ('FROM a\nCMD ["\\ud800"]', "2: CMD: '[\"\\\\ud800\"]': a JSON array must hold texts only, without NUL"),
    ("FROM a\nRUN <<E\nb\n", "2: RUN: '<<E': no line 'E' ends this here-document"),
    ("FROM a\nRUN b <<E <<-'F'\nE\nf\n", "2: RUN: \"<<-'F'\": no line 'F' ends this here-document"),
    ("FROM a\nRUN --network=none b", "2: RUN: '--network=none': this flag is not carried out here; there are --mount"),
    ("FROM a\nRUN --security=insecure b",
     "2: RUN: '--security=insecure': this flag is not carried out here; there are --mount"),
    ("FROM a\nRUN --mount=type=cache,target=/x b", f"2: RUN: 'type=cache,target=/x': {MOUNT}"),
    ("FROM a\nRUN --mount=target=/x b", f"2: RUN: 'target=/x': {MOUNT}"),
    ("FROM a\nRUN --mount=type=secret,id=a,mode=0400 b", f"2: RUN: 'type=secret,id=a,mode=0400': {MOUNT}"),
    ("FROM a\nRUN --mount=type=secret b", f"2: RUN: 'type=secret': {SECRET}"),
    ("FROM a\nRUN --mount=type=secret,id=../b b", f"2: RUN: 'type=secret,id=../b': {SECRET}"),
    ("FROM a\nRUN --mount=type=secret,id=b,target=c b", f"2: RUN: 'type=secret,id=b,target=c': {SECRET}"),
    ("FROM a\nRUN --mount=type=secret,id=b,required=2 b", f"2: RUN: 'type=secret,id=b,required=2': {SECRET}"),
    ("FROM a\nRUN --mount b", "2: RUN: '--mount': this flag needs a value"),
    ("FROM a\nRUN --mount=type=secret,id=b", "2: RUN: '': needs an argument"),
    ("FROM a\nCMD --port=1", "2: CMD: '--port=1': unknown flag; there are none"),
    ("FROM a\nCOPY --form=x b c", f"2: COPY: '--form=x': unknown flag; {OF_COPY}"),
    ("FROM a\nCOPY --link b c", f"2: COPY: '--link': this flag is not carried out here; {OF_COPY}"),
    ("FROM a\nCOPY --from= b c", "2: COPY: '--from=': this flag needs a value"),
    ("FROM a\nCOPY --chown=1 --chown=2 b c", "2: COPY: '--chown=2': this flag is given twice"),
    ("FROM a\nCOPY --chmod=u+x b c", "2: COPY: 'u+x': must be three or four octal digits"),
    ("FROM a\nCOPY --chmod=888 b c", "2: COPY: '888': must be three or four octal digits"),
    ('FROM a\nCOPY --chown="b c d', "2: COPY: '\"b c d': a double quote is not closed"),
    ("FROM a\nCOPY b", "2: COPY: 'b': needs at least one source and a destination"),
    ('FROM a\nCOPY ["b"]', "2: COPY: 'b': needs at least one source and a destination"),
    ('FROM a\nCOPY ["b", ""]', "2: COPY: '': must not be empty"),
    ("FROM a\nCOPY [1] b\nCOPY [1]", "3: COPY: '[1]': a JSON array must hold texts only, without NUL"),
    ('FROM a\nCOPY "b c" d', "2: COPY: '\"b': a double quote is not closed"),
    ("FROM a\nCOPY https://example.com/x b", f"2: COPY: 'https://example.com/x': {NO_PATH}"),
    ("FROM a\nCOPY <<b", "2: COPY: '<<b': no line 'b' ends this here-document"),
    ("FROM a\nCOPY <<b\nb", "2: COPY: '<<b': the destination cannot be a here-document"),
    ("FROM a\nCOPY c <<b\nb", "2: COPY: '<<b': the destination cannot be a here-document"),
    ("FROM a\nCOPY <<../b c\n../b", "2: COPY: '../b': the name of this here-document must be a file name"),
    ("FROM a\nCOPY <<b c\n${\nb", f"2: COPY: '${{\\n': {VARIABLE}"),
    ("FROM a\nADD http://example.com/x b", f"2: ADD: 'http://example.com/x': {NO_PATH}"),
    ("FROM a\nADD git@example.com:x/y.git b", f"2: ADD: 'git@example.com:x/y.git': {NO_PATH}"),
    ("FROM a\nADD ${u:-ssh://example.com} b", f"2: ADD: 'ssh://example.com': {NO_PATH}"),
    ("FROM a\nADD --from=b c d", "2: ADD: '--from=b': unknown flag; there are --chown, --chmod"),
    ("FROM a\nADD --checksum=sha256:0 c d",
     "2: ADD: '--checksum=sha256:0': this flag is not carried out here; there are --chown, --chmod"),
    ("FROM a\nENV b", "2: ENV: 'b': must be name=value"),
    ("FROM a\nENV b=1 c", "2: ENV: 'c': must be name=value"),
    ("FROM a\nENV =1", "2: ENV: '=1': must be name=value"),
    ("FROM a\nENV b='c d", "2: ENV: \"'c d\": a single quote is not closed"),
    ('FROM a\nENV b="c\\"', "2: ENV: '\"c\\\\\"': a double quote is not closed"),
    ("FROM a\nENV b it's", "2: ENV: \"it's\": a single quote is not closed"),
    ("FROM a\nENV b=${c?d}", f"2: ENV: '${{c?d}}': {VARIABLE}"),
    ("FROM a\nENV b=${c%d}", f"2: ENV: '${{c%d}}': {VARIABLE}"),
    ("FROM a\nENV b=${}", f"2: ENV: '${{}}': {VARIABLE}"),
    ("FROM a\nENV b=${c:-d", "2: ENV: '${c:-d': a ${ is not closed"),
    ("FROM a\nENV b=" + "${c:-" * 51, f"2: ENV: {'${c:-' * 51!r}: more than 50 ${{ within each other"),
    ("FROM a\nLABEL b", "2: LABEL: 'b': must be name=value"),
    ('FROM a\nLABEL \\\n# c\n"b', "2: LABEL: '\"b': must be name=value"),
    ("FROM a\nARG", "2: ARG: '': needs an argument"),
    ("FROM a\nARG 1b=c", f"2: ARG: '1b=c': {NAME}"),
    ("FROM a\nARG b =c", f"2: ARG: '=c': {NAME}"),
    ("FROM a\nWORKDIR", "2: WORKDIR: '': needs an argument"),
    ('FROM a\nUSER "b', "2: USER: '\"b': a double quote is not closed"),
    ("FROM a\nEXPOSE 0", f"2: EXPOSE: '0': {PORT}"),
    ("FROM a\nEXPOSE 80 65536", f"2: EXPOSE: '65536': {PORT}"),
    ("FROM a\nEXPOSE 90-80", f"2: EXPOSE: '90-80': {PORT}"),
    ("FROM a\nEXPOSE 80/sctp", f"2: EXPOSE: '80/sctp': {PORT}"),
    ("FROM a\nEXPOSE 8080:80", f"2: EXPOSE: '8080:80': {PORT}"),
    ("FROM a\nVOLUME []", "2: VOLUME: '': must not be empty"),
    ('FROM a\nVOLUME ["/b", ""]', "2: VOLUME: '': must not be empty"),
    ("FROM a\nHEALTHCHECK", "2: HEALTHCHECK: '': needs an argument"),
    ("FROM a\nHEALTHCHECK NONE b", f"2: HEALTHCHECK: 'NONE b': {HEALTH}"),
    ("FROM a\nHEALTHCHECK b", f"2: HEALTHCHECK: 'b': {HEALTH}"),
    ("FROM a\nHEALTHCHECK CMD", f"2: HEALTHCHECK: 'CMD': {HEALTH}"),
    ("FROM a\nHEALTHCHECK CMD []", f"2: HEALTHCHECK: 'CMD []': {HEALTH}"),
    ("FROM a\nHEALTHCHECK --retries=1 NONE", "2: HEALTHCHECK: 'NONE': takes no flags"),
    ("FROM a\nHEALTHCHECK --interval=5 CMD b", f"2: HEALTHCHECK: '5': {DURATION}"),
    ("FROM a\nHEALTHCHECK --interval=1s! CMD b", f"2: HEALTHCHECK: '1s!': {DURATION}"),
    ("FROM a\nHEALTHCHECK --timeout=999us CMD b", f"2: HEALTHCHECK: '999us': {DURATION}"),
    ("FROM a\nHEALTHCHECK --timeout=9999999h CMD b", f"2: HEALTHCHECK: '9999999h': {DURATION}"),
    ("FROM a\nHEALTHCHECK --retries=-1 CMD b", "2: HEALTHCHECK: '-1': must be a whole number, 0 or more"),
    ("FROM a\nHEALTHCHECK --delay=1s CMD b", f"2: HEALTHCHECK: '--delay=1s': unknown flag; {OF_HEALTHCHECK}"),
    ("FROM a\nSHELL /bin/sh -c", f"2: SHELL: '/bin/sh -c': {ARRAY}"),
    ("FROM a\nSHELL []", f"2: SHELL: '[]': {ARRAY}"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text[:60] for text, _ in BAD])
def test_bad(text, message):
    with pytest.raises(DockerfileError) as caught:
        dockerfile.parse(text, "sub/Dockerfile")
    assert str(caught.value) == f"sub/Dockerfile:{message}"


def test_an_error_carries_its_facts():
    with pytest.raises(BadInput) as caught:
        dockerfile.parse("FROM a\n\nCOPY --form=x b c\n")
    error = caught.value
    assert (error.file, error.line, error.instruction) == ("Dockerfile", 3, "COPY")
    assert (error.field, error.value) == ("COPY", "--form=x")
    assert str(error) == f"Dockerfile:3: COPY: '--form=x': {error.rule}"


def test_a_mistake_found_while_building_gets_its_place():
    with pytest.raises(DockerfileError, match="^D:7: EXPOSE: '0': must be"), dockerfile.located("D", 7, "EXPOSE"):
        dockerfile.ports(["0"])
    with pytest.raises(DockerfileError, match="^D:7: COPY: 'x'"), dockerfile.located("E", 1, "RUN"):
        raise DockerfileError("D", 7, "COPY", "x", "y")


# --- values ---

VALUES = {"x": "val", "empty": "", "two": "one two"}
EXPANSIONS = [
    "$x", "${x}", "a${x}b", "$xy", "${unset}", "$unset", "${x:-word}", "${empty:-word}", "${unset:-word}", "${x:+word}",
    "${empty:+word}", "${unset:+word}", "${unset:-$x}", "${unset:-${x}}", "${unset:-${empty:-deep}}", '"$x"', "'$x'",
    "\"a 'b' $x\"", "'a \"b\" $x'", "\"a\"'b'c", r"\$x", r'"\$x"', r"'\$x'", r'"a\"b"', r"a\"b", r"a\'b", r"a\\b",
    r'"a\\b"', r'"a\nb"', r"a\nb", r"'a\nb'", r"a\ b", '"a b"', "$two", '"$two"', '""', "''", "a=b=c", "$", "a$", '"$"',
    "$1", "${x}$x", '"${unset:-a b}"', '"${unset:-"q"}"', """'it'"'"'s'""", "日本$x", "$x/bin:$x", r'"\\$x"', r"\\\$x",
]
# The parser of buildah 1.39 does not know these.
WITHOUT_COLON = ["${x-word}", "${empty-word}", "${unset-word}", "${x+word}", "${empty+word}", "${unset+word}"]

# Nor that an escape after an escape continues no line.
NOT_CONTINUED = "LABEL two=1\\\\\nLABEL three=1\\\\\\\nLABEL last=x\n"

# One of everything that is only configuration, and of the ways to write it.
CONFIGURED = r"""
# check=skip=all
ARG base=scratch
FROM ${base} AS first
ARG build="a b" other
ENV x=val empty= two='one two'
EXPANSIONS
ENV x=new y=$x
env  old   form  of $y BLANK
ENV continued=1 \
    # a comment
BLANK
    over='two lines'\
    and=more build=${build} other=${other:-none}
LABEL a.b="c $y" "quoted key"='it is $not' \
  multi="one \
two"
LABEL old label with blanks
EXPOSE 80 53/udp 8000-8002/tcp $port
VOLUME /v1 "/$x"
VOLUME ["/v2 with blank"]
WORKDIR /a
WORKDIR $x/${y:+b}
USER ${user:-1000}:1000
STOPSIGNAL SIGQUIT
ENTRYPOINT ["/bin/e", "$x", "\u00e9"]
CMD exec "$x" \
  'y'  z
"""


def configured(text):
    """The configuration that a Dockerfile of one stage without RUN and COPY gives an image."""
    found = dockerfile.parse(text)
    (stage,) = found.stages
    config = {"Env": {}, "Labels": {}, "ExposedPorts": set(), "Volumes": set(), "WorkingDir": "/"}
    args = {}

    def value(word):
        return dockerfile.expand(word, args | config["Env"], found.escape)

    for instruction in stage.instructions:
        name, words = instruction.name, instruction.words
        if name in ("ENV", "LABEL", "ARG"):
            pairs = [pair.split("=", 1) for pair in words if "=" in pair]
            new = {value(key): value(given) for key, given in pairs}
            {"ENV": config["Env"], "LABEL": config["Labels"], "ARG": args}[name].update(new)
        elif name == "EXPOSE":
            for word in words:
                config["ExposedPorts"] |= set(dockerfile.ports(dockerfile.words(word, args | config["Env"])))
        elif name == "VOLUME":
            config["Volumes"] |= set(map(value, words))
        elif name == "WORKDIR":
            config["WorkingDir"] = f"{config['WorkingDir']}/{value(words[0])}".replace("//", "/")
        elif name in ("USER", "STOPSIGNAL"):
            config["User" if name == "USER" else "StopSignal"] = value(words[0])
        else:
            config[name.capitalize()] = list(words) if instruction.exec_form else ["/bin/sh", "-c", *words]
    return config


def read(config):
    """The same of an image's own configuration."""
    pairs = dict(pair.split("=", 1) for pair in config["Env"])
    pairs.pop("PATH", None)
    labels = {key: value for key, value in config["Labels"].items() if not key.startswith("io.buildah.")}
    return {"Env": pairs, "Labels": labels, "ExposedPorts": set(config["ExposedPorts"]),
            "Volumes": set(config["Volumes"]), "WorkingDir": config["WorkingDir"], "User": config["User"],
            "StopSignal": config["StopSignal"], "Entrypoint": config["Entrypoint"], "Cmd": config["Cmd"]}


def dockerfile_of(expansions):
    return CONFIGURED.lstrip("\n").replace("BLANK", "  ").replace(
        "EXPANSIONS\n", "".join(f"ENV v{number}={word}\n" for number, word in enumerate(expansions)))


def out(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def buildah(tmp_path):
    """buildah with a store of its own."""
    store = ["buildah", "--storage-driver=vfs", f"--root={tmp_path}/root", f"--runroot={tmp_path}/run"]

    def build(text):
        (tmp_path / "Dockerfile").write_text(text)
        out(*store, "build", "--isolation=chroot", "--quiet", "--tag=labs-dockerfile", str(tmp_path))
        return json.loads(out(*store, "inspect", "--type=image", "labs-dockerfile"))["OCIv1"]["config"]

    yield build
    out(*store, "rmi", "--all", "--force")


@pytest.fixture
def docker(tmp_path):
    """`docker build`, whose images are gone afterwards."""
    made = []

    def build(text):
        (tmp_path / "Dockerfile").write_text(text)
        made.append(out("docker", "build", "--quiet", str(tmp_path)).strip())
        return json.loads(out("docker", "image", "inspect", made[-1]))[0]["Config"]

    yield build
    for image in made:
        out("docker", "image", "rm", "--force", image)


def test_values_as_buildah_has_them(buildah):
    text = dockerfile_of(EXPANSIONS).replace("8000-8002/tcp", "8000/tcp")  # it would keep the range as it is written
    assert configured(text) == read(buildah(text))


@pytest.mark.machine
def test_values_as_docker_has_them(docker):
    text = dockerfile_of(EXPANSIONS + WITHOUT_COLON) + NOT_CONTINUED
    assert configured(text) == read(docker(text))


HEALTH_TEXT = r"""# escape=`
FROM scratch
ENV a=b` c d="e`"f" g=\h
HEALTHCHECK --interval=1m30s --timeout=.5s --start-period=100ms --retries=4 `
  CMD ["check", "$a"]
SHELL ["/bin/other", "-x"]
"""


@pytest.mark.machine
def test_health_and_another_escape_as_docker_has_them(docker):
    config = docker(HEALTH_TEXT)
    found = dockerfile.parse(HEALTH_TEXT)
    env, health, shell = found.stages[0].instructions
    values = [dockerfile.expand(word, {}, found.escape) for word in env.words]
    assert values == [pair for pair in config["Env"] if not pair.startswith("PATH=")]
    lengths = {flag: dockerfile.nanoseconds(health.flags[flag]) for flag in ("interval", "timeout", "start-period")}
    assert config["Healthcheck"] == {"Test": list(health.words), "Interval": lengths["interval"], "Retries": 4,
                                     "Timeout": lengths["timeout"], "StartPeriod": lengths["start-period"]}
    assert config["Shell"] == list(shell.words)


@pytest.mark.machine
def test_here_documents_of_copy_as_docker_has_them(tmp_path):
    text = "FROM scratch\nENV x=val\nCOPY <<a <<'b' <<-c /d/\n" + "".join(
        f"""{indent}$x ${{x:-w}} "q" 'r $x' \\$x \\\\ \\n "'\n{indent}{name}\n""" for name, indent in
        [("a", ""), ("b", ""), ("c", "\t")])
    (tmp_path / "Dockerfile").write_text(text)
    out("docker", "build", "--quiet", f"--output=type=local,dest={tmp_path}/out", str(tmp_path))
    for document in dockerfile.parse(text).stages[0].instructions[1].heredocs:
        mine = dockerfile.expand(document.text, VALUES, quotes=False) if document.expand else document.text
        assert (tmp_path / "out/d" / document.name).read_text() == mine


@pytest.mark.parametrize("text", [
    "cat <<A; cat <<-'B'\n1 $x\nA\n\t2 $x\n\tB", "(cat <<A) && cat << B\n${x:-no}\nA\nB", "cat <<A|tr a-z A-Z\nabc\nA",
    'cat 0<<"A" - 3<<\\B <&3\n$x\nA\n$x\nB'])
def test_a_shell_reads_the_here_documents_of_run_as_written(text):
    given = one(f"RUN {text}")
    assert out("sh", "-c", f"x=val; {dockerfile.command(given)}") == out("sh", "-c", f"x=val; {text}")


def test_a_run_that_is_only_a_here_document_is_the_script():
    assert dockerfile.command(one("RUN <<-E\n\techo a\n\tE")) == "echo a\n"
    assert dockerfile.command(one("RUN <<'E'\n#!/bin/x\nE")) == "#!/bin/x\n"
    assert dockerfile.command(one("RUN 'quoted'")) == "'quoted'"


def test_values_may_follow_each_other_as_often_as_wanted():
    assert dockerfile.expand("${u:-a}" * 200 + "${u:-" * 50 + "}" * 50, {}) == "a" * 200


def test_words_split_where_nothing_is_quoted():
    found = dockerfile.words("a $two \"b $two\" 'c  d' e\\ f \"\"", VALUES)
    assert found == ["a", "one", "two", "b one two", "c  d", "e f"]
    assert dockerfile.words(" 80$empty  $unset ", VALUES) == ["80"]


def test_numbers():
    assert dockerfile.ports(["80", "8000-8002/UDP"]) == ["80/tcp", "8000/udp", "8001/udp", "8002/udp"]
    assert [dockerfile.nanoseconds(text) for text in ("0", "1ms", "1.5s", "1h2m3s")] == [
        0, 10**6, 1_500_000_000, 3723 * 10**9]
    assert (dockerfile.mode("0755"), dockerfile.mode("4711"), dockerfile.retries("3")) == (0o755, 0o4711, 3)
    assert dockerfile.local("a:b//c") == "a:b//c"


# --- whatever is written ---

PIECES = st.sampled_from([
    "FROM a", "FROM a AS b", *dockerfile.INSTRUCTIONS, "ONBUILD", "--from=a", "--mount=type=secret,id=a", "--",
    "<<E", "<<-'E'", "E", "a=b", "a", "80/tcp", '["a"]', "[", "]", '"', "'", "\\", "`", "$", "${", "${a:-", "}", "#",
    "# escape=`", "\n", "\r\n", "\t", " ", " ", " ", "\x85", "é"])


@FEW
@given(st.text(max_size=60) | st.lists(PIECES, max_size=25).map("".join))
def test_parse_returns_or_raises_a_dockerfile_error(text):
    message = "one line"
    try:
        dockerfile.parse(text)
    except DockerfileError as error:
        message = str(error)
    assert len(message.splitlines()) == 1


@FEW
@given(st.sampled_from(["ENV a=", "LABEL ", "COPY ", "WORKDIR ", "VOLUME ", "ARG a=", "EXPOSE $a"]),
       st.lists(PIECES, max_size=12).map("".join), st.dictionaries(st.just("a"), st.text()))
def test_what_was_parsed_can_be_expanded_whatever_the_values(name, rest, values):
    try:
        found = dockerfile.parse(f"FROM a\n{name}{rest}\n")
    except DockerfileError:
        return
    for instruction in [found for stage in found.stages for found in stage.instructions]:
        if instruction.name in dockerfile.EXPANDED:
            for part in [part for word in instruction.words for part in word.split("=", 1)]:
                dockerfile.expand(part, values, found.escape)


@FEW
@given(st.lists(st.text(min_size=1).filter(lambda text: "\0" not in text)))
def test_what_shlex_quotes_is_one_word(texts):
    assert dockerfile.words(shlex.join(texts), {}) == texts
    assert dockerfile.expand(shlex.join(texts), {}) == " ".join(texts)

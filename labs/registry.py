"""A client of a registry: the OCI distribution specification, request by request (distribution-spec/spec.md).

A registry is an HTTP server with two kinds of things in it: blobs and manifests, both named by digest, manifests also
by tag.  Nothing that it says is believed: digest and size of what comes are held against what was asked for, and
only then does it enter a layout.  What was cut off in the middle stays in the layout's partial/, and goes on there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.utils import parse_dict_header, parse_header_links

from labs import image
from labs.errors import BadInput, Mismatch, RegistryError
from labs.image import HOST, INDEX, INDEXES, MANIFEST_LIMIT, MANIFESTS, Descriptor, Layout, Platform

# distribution-spec/spec.md, "Pulling manifests": <name> and <reference>
REPOSITORY = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*")
TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
ADDRESS = re.compile(r"([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?", re.ASCII)
LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")
RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")  # Content-Range: RFC 9110, section 14.4
TIMEOUT = (10.0, 60.0)  # seconds until there is a connection, and between two pieces of an answer
BLOCK = 1 << 16
REDIRECTS = 5
PAGES = 1000  # of a list, and manifests below one index
BYTES = {"Content-Type": "application/octet-stream"}
PULL, PUSH, DELETE = "pull", "push", "delete"

Progress = Callable[[int, int], object]  # called with (bytes done, bytes in all)


def silent(done: int, total: int) -> None:
    """The progress of a transfer that nobody watches."""


class Bar:
    """A progress bar that only ever grows, so it moves in a terminal, in a notebook and in a log alike."""

    WIDTH = 40

    def __init__(self, label: str) -> None:
        self._drawn = 0
        sys.stdout.write(f"{label} ")

    def __call__(self, done: int, total: int) -> None:
        """Draw what has been done since the last call."""
        wanted = self.WIDTH * done // total if total else self.WIDTH
        sys.stdout.write("#" * (wanted - self._drawn))
        if self._drawn < wanted == self.WIDTH:
            sys.stdout.write(" 100 %\n")
        self._drawn = max(wanted, self._drawn)
        sys.stdout.flush()


class Answer(NamedTuple):
    """A whole answer: its HTTP status, its headers, its body, and the address that gave it."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str


class Registry:
    """A registry by its address, with a user and password where it wants them; http on the loopback interface.

    Requests need a scope, (repository, what for); the token got for a scope serves until the registry refuses it.
    """

    def __init__(self, host: str, user: str | None = None, password: str | None = None) -> None:
        if not ADDRESS.fullmatch(host):
            raise BadInput("registry", host, "must be HOST or HOST:PORT")
        self.host, self.url = host, f"{_scheme(host)}://{host}"
        self._basic = _basic(user, password) if user is not None else ""
        self._authorization: dict[tuple[str, str], str] = {}
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy and no ~/.netrc decide what is sent to whom
        self._session.max_redirects = REDIRECTS
        self._session.headers.update({"User-Agent": "labs", "Accept-Encoding": "identity"})

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    # One request

    @contextmanager
    def _open(self, step: str, method: str, path: str, scope: tuple[str, str], *, expect: Sequence[int] = (200,),
              body: Callable[[], Any] = lambda: None, **more: Any) -> Iterator[requests.Response]:
        """Send a request, with a token if one is asked for, and give its answer; RegistryError on another status."""
        with _told(step):
            response = self._send(method, path, scope, body, more)
            if response.status_code == 401 and not response.history:  # not from where a redirect led to
                with response:
                    self._authorize(step, scope, response.headers.get("WWW-Authenticate", ""))
                response = self._send(method, path, scope, body, more)
            with response:
                if response.status_code not in expect:
                    raise _refusal(step, response)
                yield response

    def _send(self, method: str, path: str, scope: tuple[str, str], body: Callable[[], Any],
              more: Mapping[str, Any]) -> requests.Response:
        """The library follows redirects, and sends no Authorization to another host than the first."""
        headers = dict(more.get("headers", {}))
        if scope in self._authorization:
            headers["Authorization"] = self._authorization[scope]
        return self._session.request(
            method, urljoin(self.url, path), headers=headers, params=more.get("params"), data=body(), stream=True,
            timeout=TIMEOUT, allow_redirects=method in ("GET", "HEAD"))

    def _ask(self, step: str, method: str, path: str, scope: tuple[str, str], *, limit: int = MANIFEST_LIMIT,
             **more: Any) -> Answer:
        """A request whose answer is small."""
        with self._open(step, method, path, scope, **more) as response:
            body = _read(response, limit + 1)
            if len(body) > limit:
                raise BadInput(step, f"over {limit} bytes", "the answer must not be longer than that")
            return Answer(response.status_code, response.headers, body, response.url)

    def _own(self, step: str, answer: Answer, location: str) -> str:
        """An address in an answer, relative or not; it must lead to this registry: a token is sent there."""
        url = urljoin(answer.url, location)
        if urlsplit(url)[:2] != urlsplit(self.url)[:2]:
            raise RegistryError(step, "leads to another host", answer.status)
        return url

    # Tokens

    def _authorize(self, step: str, scope: tuple[str, str], challenge: str) -> None:
        """Do what WWW-Authenticate asks for (RFC 9110, section 11.6.1): a login, or a token for it."""
        kind, _, rest = challenge.partition(" ")
        fields = parse_dict_header(rest)
        if kind.lower() == "bearer" and fields.get("realm"):
            self._authorization[scope] = f"Bearer {self._token(fields)}"
        elif kind.lower() == "basic" and self._basic:
            self._authorization[scope] = self._basic
        else:
            raise RegistryError(step, "401: asks for a user and a password", 401, "UNAUTHORIZED")

    def _token(self, fields: Mapping[str, str | None]) -> str:
        """Get a token from the service that the challenge names (distribution: spec/auth/token.md)."""
        realm = urlsplit(str(fields["realm"]))
        if realm.scheme != "https" and not (realm.scheme == "http" and LOOPBACK.fullmatch(realm.netloc)):
            raise RegistryError("token", "the password must not go to an address that is not https")
        wanted = {"service": fields.get("service"), "scope": (fields.get("scope") or "").split()}
        with _told("token"), self._session.get(
                realm.geturl(), params=wanted, headers={"Authorization": self._basic} if self._basic else {},
                stream=True, timeout=TIMEOUT, allow_redirects=False) as response:
            if response.status_code != 200:
                raise _refusal("token", response)
            value = _json("token", _read(response, MANIFEST_LIMIT))
        token = value.get("token") or value.get("access_token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise RegistryError("token", "there is none in the answer", 200)
        return token

    # Reading

    def ping(self) -> None:
        """Ask whether this is a registry that lets us in: GET /v2/ (end-1)."""
        self._ask("ping", "GET", "/v2/", ("", PULL))

    def tags(self, repository: str, page: int = 0) -> list[str]:
        """Every tag of a repository, page by page (end-8): the Link header says where the next one is."""
        path = f"/v2/{check_repository(repository)}/tags/list" + (f"?n={page}" if page else "")
        found: list[str] = []
        for answer in self._pages("tags", path, (repository, PULL)):
            found += _json("tags", answer.body).get("tags") or []
        return found

    def _pages(self, step: str, path: str, scope: tuple[str, str], **more: Any) -> Iterator[Answer]:
        seen: set[str] = set()
        while path:
            if path in seen or len(seen) > PAGES:
                raise RegistryError(step, "the list of pages has no end", 200)
            seen.add(path)
            answer = self._ask(step, "GET", path, scope, **more)
            yield answer
            links = {one.get("rel"): one["url"] for one in parse_header_links(answer.headers.get("Link", ""))}
            path = self._own(step, answer, links["next"]) if "next" in links else ""

    def manifest(self, repository: str, reference: str) -> tuple[Descriptor, bytes]:
        """A manifest or an index by tag or digest (end-3), checked; its descriptor, and its bytes as they came."""
        path, step = _manifest_path(repository, reference), f"manifest {reference}"
        answer = self._ask(step, "GET", path, (repository, PULL), headers={"Accept": ", ".join(INDEXES + MANIFESTS)})
        told = answer.headers.get("Docker-Content-Digest", "")
        wanted = reference if ":" in reference else image.digest(answer.body)
        for expected in (wanted, image.check_digest(told) if told else wanted):
            if expected != (computed := _digest_like(expected, answer.body)):
                raise Mismatch(step, "digest", expected, computed)
        media_type = answer.headers.get("Content-Type", "").partition(";")[0].strip()
        if media_type not in INDEXES + MANIFESTS:
            raise BadInput(f"{step}: Content-Type", media_type, f"must be one of {', '.join(INDEXES + MANIFESTS)}")
        inside = _json(step, answer.body).get("mediaType", media_type)
        if inside != media_type:
            raise BadInput(f"{step}: mediaType", inside, f"must be what Content-Type says: {media_type}")
        return Descriptor(media_type, wanted, len(answer.body)), answer.body

    def head(self, repository: str, reference: str) -> Descriptor | None:
        """What a tag or digest points to, without fetching it (HEAD); None where there is nothing."""
        answer = self._ask(f"manifest {reference}", "HEAD", _manifest_path(repository, reference), (repository, PULL),
                           expect=(200, 404), headers={"Accept": ", ".join(INDEXES + MANIFESTS)})
        return _descriptor_of(answer.headers) if answer.status == 200 else None

    def has_blob(self, repository: str, digest: str) -> bool:
        """Whether a repository has a blob (HEAD, end-2)."""
        answer = self._ask("blob", "HEAD", _blob_path(repository, digest), (repository, PULL), expect=(200, 404))
        return answer.status == 200

    def blob(self, repository: str, what: Descriptor, layout: Layout, progress: Progress = silent) -> None:
        """Fetch a blob into a layout (end-2), from where an earlier attempt stopped; nothing is done if it is there."""
        if layout.has(what.digest):
            progress(what.size, what.size)
            return
        with layout.incoming(what) as blob:
            progress(blob.offset, what.size)
            if blob.offset < what.size:
                self._fetch(repository, what, blob, progress)

    def _fetch(self, repository: str, what: Descriptor, blob: image.Incoming, progress: Progress) -> None:
        headers = {"Range": f"bytes={blob.offset}-"} if blob.offset else {}
        with self._open("blob", "GET", _blob_path(repository, what.digest), (repository, PULL), headers=headers,
                        expect=(200, 206)) as response:
            if response.status_code == 200 and blob.offset:
                blob.restart()  # a registry need not know Range
            _check_length(response, what, blob.offset)
            for data in response.raw.stream(BLOCK, decode_content=False):
                blob.write(data)
                progress(blob.offset, what.size)
            if blob.offset < what.size:
                raise RegistryError("blob", "the answer ended early", response.status_code)

    def referrers(self, repository: str, digest: str, artifact_type: str = "") -> list[Descriptor]:
        """The manifests that name this one as their subject (end-12), or what the fallback tag lists."""
        path = f"/v2/{check_repository(repository)}/referrers/{image.check_digest(digest)}"
        found: list[Descriptor] = []
        for answer in self._pages("referrers", path, (repository, PULL), expect=(200, 404)):
            if answer.status == 404:
                found = self._fallback(repository, digest)
            else:
                found += _manifests_in(_json("referrers", answer.body))
        return [one for one in found if artifact_type in ("", one.artifact_type)]

    def _fallback(self, repository: str, digest: str) -> list[Descriptor]:
        """spec.md, "Referrers Tag Schema": an index that clients keep under a tag made from the digest."""
        try:
            what, data = self.manifest(repository, fallback_tag(digest))
        except RegistryError as error:
            if error.status == 404:
                return []
            raise
        if what.media_type != INDEX:
            raise BadInput("referrers", what.media_type, f"must be {INDEX}")
        return _manifests_in(_json("referrers", data))

    # Writing

    def push_blob(self, repository: str, what: Descriptor, layout: Layout, *, mount: str = "", chunk: int = 0,
                  progress: Progress = silent) -> str:
        """Make a repository have a blob; how: "there" (HEAD), "mounted" from another repository, or "sent".

        chunk: bytes a PATCH (end-5), or 0: the whole in one PUT (end-6).
        """
        done = "there" if self.has_blob(repository, what.digest) else ""
        if not done:
            with layout.open(what.digest) as file:
                done = self._upload(repository, what, file, mount, chunk, progress)
        progress(what.size, what.size)
        return done

    def _upload(self, repository: str, what: Descriptor, file: BinaryIO, mount: str, chunk: int,
                progress: Progress) -> str:
        """POST (end-4a), or POST with mount= (end-11), which may make an ordinary upload of it."""
        scope, params = (repository, PUSH), {}
        if mount:
            scope, params = (repository, f"mount {mount}"), {"mount": what.digest, "from": check_repository(mount)}
        answer = self._ask("upload", "POST", f"/v2/{check_repository(repository)}/blobs/uploads/", scope,
                           params=params, expect=(201, 202))
        if answer.status == 201:
            return "mounted"
        place = self._location(answer)
        try:
            while chunk and (data := file.read(chunk)):
                answer = self._send_chunk(place, scope, data, file.tell() - len(data))
                place = self._location(answer)
                _check_received(answer, file.tell())
                progress(file.tell(), what.size)
            self._finish(place, scope, what, None if chunk else file, progress)
        except BaseException:
            with suppress(RegistryError):
                self._ask("cancel upload", "DELETE", place, scope, expect=(204,))
            raise
        return "sent"

    def _location(self, answer: Answer) -> str:
        """Where the next request of an upload goes; each answer says it anew."""
        if not answer.headers.get("Location"):
            raise RegistryError("upload", "the answer has no Location", answer.status)
        return self._own("upload", answer, answer.headers["Location"])

    def _send_chunk(self, place: str, scope: tuple[str, str], data: bytes, start: int) -> Answer:
        """PATCH with the range that this is (end-5); the answer says in Range how much the registry has."""
        headers = {**BYTES, "Content-Range": f"{start}-{start + len(data) - 1}"}
        return self._ask("upload", "PATCH", place, scope, expect=(202,), headers=headers, body=lambda: data)

    def _finish(self, place: str, scope: tuple[str, str], what: Descriptor, file: BinaryIO | None,
                progress: Progress) -> None:
        """PUT with the digest, and with the whole blob where it was not sent in chunks (end-6)."""
        answer = self._ask("upload", "PUT", place, scope, params={"digest": what.digest}, expect=(201,), headers=BYTES,
                           body=lambda: _Body(file, what.size, progress) if file else None)
        if (told := answer.headers.get("Docker-Content-Digest", what.digest)) != what.digest:
            raise Mismatch("upload", "digest", what.digest, told)

    def put_manifest(self, repository: str, reference: str, data: bytes, media_type: str) -> Descriptor:
        """Store a manifest under a tag or its digest (end-7); its blobs must be there.

        With a subject, whoever asks for the subject's referrers finds it: the registry says OCI-Subject when it sees
        to that itself, else the fallback tag is written here.
        """
        what, step = Descriptor(media_type, image.digest(data), len(data)), f"put manifest {reference}"
        answer = self._ask(step, "PUT", _manifest_path(repository, reference), (repository, PUSH), expect=(201,),
                           body=lambda: data, headers={"Content-Type": media_type})
        if (told := answer.headers.get("Docker-Content-Digest", what.digest)) != what.digest:
            raise Mismatch(step, "digest", what.digest, told)
        value = _json(step, data)
        if value.get("subject") and "OCI-Subject" not in answer.headers:
            self._refer(repository, image.descriptor(value["subject"], "subject").digest, _referrer(what, value))
        return what

    def _refer(self, repository: str, subject: str, what: Descriptor) -> None:
        """Add to the fallback tag's index; two clients that do so at once may lose one entry, as the text says too."""
        known = self._fallback(repository, subject)
        if what.digest not in {one.digest for one in known}:
            entries = [one.json() for one in (*known, what)]
            index = image.canonical({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries})
            self.put_manifest(repository, fallback_tag(subject), index, INDEX)

    def delete(self, repository: str, reference: str) -> None:
        """Delete a manifest by its digest, with every tag that names it, or a single tag (end-9).

        A registry may refuse either: distribution 2.8 knows no deletion of a tag alone.
        """
        self._ask(f"delete {reference}", "DELETE", _manifest_path(repository, reference), (repository, DELETE),
                  expect=(202,))

    def delete_blob(self, repository: str, digest: str) -> None:
        """Take a blob out of a repository (end-10)."""
        self._ask("delete blob", "DELETE", _blob_path(repository, digest), (repository, DELETE), expect=(202,))


class _Body:
    """A file as the body of a request: its length is known, and each read is told."""

    def __init__(self, file: BinaryIO, size: int, progress: Progress) -> None:
        self._file, self._size, self._progress = file, size, progress
        file.seek(0)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        return iter(lambda: self.read(BLOCK), b"")

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._progress(self._file.tell(), self._size)
        return data


# Names and small answers


def check_repository(name: str) -> str:
    """A repository's name as the specification has it, or BadInput."""
    if not REPOSITORY.fullmatch(name):
        raise BadInput("repository", name, "must be lower-case letters and digits with . _ - between, in parts by /")
    return name


def _manifest_path(repository: str, reference: str) -> str:
    if not TAG.fullmatch(reference):
        image.check_digest(reference, "reference")
    return f"/v2/{check_repository(repository)}/manifests/{reference}"


def _blob_path(repository: str, digest: str) -> str:
    return f"/v2/{check_repository(repository)}/blobs/{image.check_digest(digest)}"


def fallback_tag(digest: str) -> str:
    """The tag of the referrers' index: sha256-… (spec.md, "Referrers Tag Schema")."""
    algorithm, _, digits = digest.partition(":")
    return f"{algorithm[:32]}-{digits[:64]}"


def _digest_like(expected: str, data: bytes) -> str:
    """The digest of data in the same algorithm."""
    algorithm = expected.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def _scheme(host: str) -> str:
    return "http" if LOOPBACK.fullmatch(host) else "https"


def _basic(user: str, password: str | None) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password or ''}".encode()).decode()


def _descriptor_of(headers: Mapping[str, str]) -> Descriptor:
    """What the headers of a manifest say about it."""
    size = headers.get("Content-Length", "")
    return image.descriptor({"mediaType": headers.get("Content-Type"), "digest": headers.get("Docker-Content-Digest"),
                             "size": int(size) if size.isdigit() else None}, "HEAD")


def _manifests_in(index: Mapping[str, Any]) -> list[Descriptor]:
    return [image.descriptor(one, f"manifests[{n}]") for n, one in enumerate(index.get("manifests") or [])]


def _referrer(what: Descriptor, value: Mapping[str, Any]) -> Descriptor:
    """How a list of referrers names a manifest: with its type and annotations (spec.md, "Listing Referrers")."""
    kind = value.get("artifactType") or (value.get("config") or {}).get("mediaType", "")
    return what._replace(artifact_type=kind, annotations=value.get("annotations") or {})


def _json(step: str, data: bytes) -> dict[str, Any]:
    value = image.parse(data, step)
    if not isinstance(value, dict):
        raise BadInput(step, data[:40].decode("utf-8", "replace"), "must be a JSON object")
    return value


def _read(response: requests.Response, limit: int) -> bytes:
    """At most limit bytes of the body, as they came."""
    parts: list[bytes] = []
    for data in response.raw.stream(min(BLOCK, limit), decode_content=False):
        parts.append(data)
        if (limit := limit - len(data)) <= 0:
            break
    return b"".join(parts)


def _check_length(response: requests.Response, what: Descriptor, offset: int) -> None:
    """Content-Range and Content-Length must fit the descriptor before a byte is taken."""
    if response.status_code == 206:
        told = RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not told or int(told[1]) != offset or told[2] not in ("*", str(what.size)):
            raise RegistryError("blob", "the answer is another range than the one asked for", 206)
    length = response.headers.get("Content-Length")
    if length is not None and length != str(what.size - offset):
        raise Mismatch("blob", "Content-Length", what.size - offset, length)


def _check_received(answer: Answer, size: int) -> None:
    """The Range header after a chunk says which bytes the registry has: all that were sent."""
    if (there := answer.headers.get("Range", "")) != f"0-{size - 1}":
        raise Mismatch("upload", "Range", f"0-{size - 1}", there)


# Errors


def _refusal(step: str, response: requests.Response) -> RegistryError:
    """The error in an answer: its own code and message (spec.md, "Error Codes") where it has them."""
    code = message = ""
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        first = json.loads(_read(response, BLOCK))["errors"][0]
        code, message = str(first["code"]), str(first.get("message", ""))
    words = [str(response.status_code), code or response.reason or "", *([f"({message})"] if message else [])]
    if wait := response.headers.get("Retry-After"):
        words.append(f"try again after {wait} s")
    return RegistryError(step, " ".join(filter(None, words)), response.status_code, code)


@contextmanager
def _told(step: str) -> Iterator[None]:
    """Whatever goes wrong on the way becomes a RegistryError."""
    try:
        yield
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise RegistryError(step, _reason(error)) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, requests.TooManyRedirects):
        return f"more than {REDIRECTS} redirects"
    if isinstance(error, ValueError):
        return "leads to something that is no http address"
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return "no answer in time"
    while error.__context__:
        error = error.__context__
    return "connection refused" if isinstance(error, ConnectionRefusedError) else "the connection broke"


# Whole images


def pull(registry: Registry, repository: str, reference: str, layout: Layout, *, platform: Platform | None = HOST,
         name: str | None = None, progress: Progress = silent) -> Descriptor:
    """Fetch an image into a layout and name it there (as the repository, if nothing else is said); its manifest.

    platform: which one of an index, or None: all of it.  Blobs come before the manifests that name them, and the
    name comes last, so that a name never leads to what is not there.
    """
    manifests = _fetch_manifests(registry, repository, reference, platform)
    blobs = _blobs(manifests)
    for done, total, one in _counted(blobs):
        registry.blob(repository, one, layout, lambda n, _, done=done, total=total: progress(done + n, total))  # type: ignore[misc]
    for what, data in reversed(manifests):
        layout.add(data, what.media_type)
    layout.tag(name or repository, manifests[0][0])
    return manifests[0][0]


def _fetch_manifests(registry: Registry, repository: str, reference: str,
                     platform: Platform | None) -> list[tuple[Descriptor, bytes]]:
    """The manifest of a platform, or the one asked for and all below it, parents first."""
    found = [registry.manifest(repository, reference)]
    for one in found:  # which grows on the way
        below = _below(one)
        if platform and one[0].media_type in INDEXES:
            below = [image.choose(below, platform)]
        if len(found) + len(below) > PAGES:
            raise BadInput("index", reference, f"must not lead to more than {PAGES} manifests")
        found += [_named(registry, repository, child) for child in below]
    return found[-1:] if platform else found


def _named(registry: Registry, repository: str, one: Descriptor) -> tuple[Descriptor, bytes]:
    """The manifest that an index names; size and type must be what it says there."""
    what, data = registry.manifest(repository, one.digest)
    for field in ("size", "media_type"):
        if (found := getattr(what, field)) != (expected := getattr(one, field)):
            raise Mismatch("manifest", field, expected, found)
    return what, data


def _below(found: tuple[Descriptor, bytes]) -> list[Descriptor]:
    """The manifests that an index names; a manifest names none."""
    what, data = found
    kind = "image-index-schema.json" if what.media_type in INDEXES else "image-manifest-schema.json"
    value = image.parse(data, "manifest")
    image.check(value, kind, "manifest")
    return image.children(value) if what.media_type in INDEXES else []


def _blobs(manifests: Iterable[tuple[Descriptor, bytes]]) -> list[Descriptor]:
    """Configurations and layers, each once."""
    named = [one for what, data in manifests if what.media_type in MANIFESTS
             for one in image.children(image.parse(data, "manifest"))]
    return list({one.digest: one for one in named}.values())


def _counted(blobs: Sequence[Descriptor]) -> Iterator[tuple[int, int, Descriptor]]:
    """Each blob with the bytes before it and the bytes of all."""
    done, total = 0, sum(one.size for one in blobs)
    for one in blobs:
        yield done, total, one
        done += one.size


def push(registry: Registry, repository: str, tag: str, layout: Layout, name: str, *, mount: str = "", chunk: int = 0,
         progress: Progress = silent) -> dict[str, str]:
    """Send an image with all that it names, and tag it; how each blob came there, by its digest (see push_blob).

    Blobs first, manifests from the bottom up, the tag last: a registry refuses a manifest whose blobs it has not.
    """
    top = layout.find(name)
    manifests = [(top, layout.read(top))]
    for one in manifests:
        manifests += [(below, layout.read(below)) for below in _below(one)]
    how: dict[str, str] = {}
    for done, total, blob in _counted(_blobs(manifests)):
        how[blob.digest] = registry.push_blob(
            repository, blob, layout, mount=mount, chunk=chunk,
            progress=lambda n, _, done=done, total=total: progress(done + n, total))  # type: ignore[misc]
    for what, data in reversed(manifests):
        registry.put_manifest(repository, tag if what is top else what.digest, data, what.media_type)
    return how

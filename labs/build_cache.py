"""The layers of a build: packed once, found again by a cache key, unpacked where something is to be made on them.

The cache key of a layer is the SHA-256 of the key before it and of what decides what the layer holds:

=========  =====================================================================================
FROM       the digest of the image's manifest, and SOURCE_DATE_EPOCH, which decides its times
RUN        the command, ENV, the ARGs in force, WORKDIR, USER, the names (not the contents) of secrets
COPY, ADD  the destination, --chown, --chmod, and of the files: names, kinds, modes, contents; no times
WORKDIR    the path
=========  =====================================================================================

So, as in BuildKit, a LABEL changes no key, a touched file changes none, and a changed file changes its COPY's and
all keys after it.  What a RUN reads besides (the time, a network) is not in its key: it is not run again for that.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, TypeAlias

from labs import image, layer
from labs.build_config import State
from labs.build_root import Root, mounted

Stack: TypeAlias = Sequence[tuple[image.Descriptor, str]]


class Made(NamedTuple):
    """A layer, and the second in which it was made."""

    layer: image.Descriptor
    diff_id: str
    created: int


def stack(found: image.Image) -> list[tuple[image.Descriptor, str]]:
    """An image's layers with their diffIDs."""
    return list(zip(found.layers, found.diff_ids, strict=True))


def key_of(*facts: object) -> str:
    """A cache key: 64 hexadecimal digits."""
    return image.digest(image.canonical(facts)).partition(":")[2]


class Store:
    """Where the layers of a build are kept: blobs in a layout, what key they have in its cache/, directories in folder.

    use: whether the cache is asked.  created: when the layers used were made, in seconds.
    """

    def __init__(self, layout: image.Layout, folder: str, epoch: int | None, use: bool) -> None:
        self.layout, self.folder, self.epoch, self.use = layout, folder, epoch, use
        self.created: list[int] = []

    def add(self, state: State, text: str, facts: Sequence[object],
            make: Callable[[], AbstractContextManager[str]]) -> bool:
        """Give a stage the layer of that key, or the upper directory that make() gives; whether it was in the cache.

        text: what the history says of it.
        """
        key = key_of(state.key, *facts)
        found = self._cached(key) if self.use else None
        made = found or self._pack(make)
        if not found:
            self._keep(key, made)
        state.key = key
        state.layers.append((made.layer, made.diff_id))
        state.history.append({"created_by": text})
        self.created.append(made.created)
        return found is not None

    def _pack(self, make: Callable[[], AbstractContextManager[str]]) -> Made:
        with make() as upper:
            packed, diff_id = image.add_layer(self.layout, upper, epoch=self.epoch)
        return Made(packed, diff_id, int(time.time()) if self.epoch is None else self.epoch)

    def _place(self, key: str) -> str:
        return f"{self.layout.path}/cache/{key}.json"

    def _cached(self, key: str) -> Made | None:
        """The layer that was made for a key, if its blob is still there."""
        try:
            with open(self._place(key), encoding="utf-8") as file:
                value = json.load(file)
            blob, diff_id = image.descriptor(value["layer"], "layer"), image.check_digest(value["diffID"])
            found = Made(blob, diff_id, int(value["created"]))
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return found if self.layout.has(blob.digest) else None

    def _keep(self, key: str, made: Made) -> None:
        value = {"layer": made.layer.json(), "diffID": made.diff_id, "created": made.created}
        os.makedirs(os.path.dirname(self._place(key)), exist_ok=True)
        fresh = f"{self._place(key)}.{os.path.basename(self.folder)}"
        with open(fresh, "wb") as file:
            file.write(image.canonical(value))
        os.rename(fresh, self._place(key))

    def directories(self, layers: Stack, layout: image.Layout | None = None) -> list[str]:
        """Layers as directories, lowest first, unpacked for this build when they are first needed."""
        settings = {"rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id in layers]}}
        no_blob = image.Descriptor(image.CONFIG, "", 0)
        whole = image.Image(no_blob, no_blob, tuple(blob for blob, _ in layers), settings)
        return image.unpack_layers(layout or self.layout, whole, f"{self.folder}/layers")

    @contextmanager
    def root(self, layers: Stack, layout: image.Layout | None = None) -> Iterator[Root]:
        """The root file system that layers make, to read and to write."""
        with mounted(self.folder, self.directories(layers, layout)) as root:
            yield root

    def take_over(self, source: image.Layout, blobs: Sequence[image.Descriptor]) -> None:
        """Copy the layers of a base image, checked, into the layout that is built into."""
        for blob in blobs:
            if not self.layout.has(blob.digest):
                with source.open(blob.digest) as file, self.layout.incoming(blob) as copy:
                    shutil.copyfileobj(file, copy, layer.BLOCK)

"""Change bytes of valid layers by chance, many thousand times: each is unpacked or refused, nothing else happens.

`./lab test` runs a hundred of these (tests/test_layer_attacks.py), this runs RUNS × 1,000 of each kind, and prints
what became of them. It ends with an error at the first layer that escapes, or that fails in a way not listed.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping

from bench.table import Row, main
from labs import layer
from labs.errors import BadInput, KernelError
from tests import layers
from tests.test_layer_attacks import SEEDS, SMALL

EACH = 1000
VALUES = bytes(range(256)) + b"./01234567LKxgS \0\x80\xff" * 20  # what headers are made of, more often
NAMES = ("pax", "sparse 1.0", "sparse gnu", "gnu", "gzip", "zstd")


def one(data: bytes, folder: str, way: str) -> str:
    """Unpack one changed layer beside a canary; what became of it."""
    target = f"{folder}/target"
    os.mkdir(target)
    try:
        layer.unpack(io.BytesIO(data), target, whiteouts=way, limits=SMALL)  # type: ignore[arg-type]
    except BadInput as error:
        return "refused: " + error.rule.partition(":")[0][:60]
    except KernelError as error:
        return f"refused by the kernel: {error.strerror}"
    else:
        return "unpacked"
    finally:
        shutil.rmtree(target)
        with open(f"{folder}/canary", encoding="ascii") as canary:
            if canary.read() != "alive" or sorted(os.listdir(folder)) != ["canary"]:
                raise SystemExit(f"a layer has escaped: {data.hex()}")


def many(seed: bytes, number: int, folder: str) -> Mapping[str, int]:
    """Unpack a seed in that many changed forms."""
    ends: Counter[str] = Counter()
    for turn in range(number):
        chance = random.Random(turn)
        changes = [(chance.randrange(len(seed)), chance.choice(VALUES)) for _ in range(chance.randint(1, 8))]
        data = layers.mutated(seed, changes, mend=bool(turn % 2))
        if turn % 5 == 0:
            data = data[:chance.randrange(len(data))]
        ends[one(data, folder, ("overlay", "apply")[turn % 3 == 0])] += 1
    return ends


def measure(runs: int) -> list[Row]:
    """RUNS × 1,000 changed layers of each kind; the time of one in a row."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="labs-fuzz-") as folder:
        with open(f"{folder}/canary", "w", encoding="ascii") as canary:
            canary.write("alive")
        for name, seed in zip(NAMES, SEEDS, strict=True):
            start = time.perf_counter()
            ends = many(seed, runs * EACH, folder)
            seconds = (time.perf_counter() - start) / (runs * EACH)
            print(f"\n{name}: {sum(ends.values())} changed layers, {seconds * 1e6:.0f} µs each")
            for end, count in sorted(ends.items(), key=lambda item: -item[1]):
                print(f"{count:>8}  {end}")
            rows.append(Row(name, seconds, seconds, runs))
    return rows


if __name__ == "__main__":
    main("fuzz", measure)

"""The exercises of 07-compose/04-to-orchestration."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping

from labs import namespaces
from labs.check import Steps, exercise

Plan = Callable[[set[str], set[str]], tuple[set[str], set[str]]]
# Desired, observed, and what turns the second into the first.
CASES: tuple[tuple[set[str], set[str], str], ...] = (
    ({"a", "b"}, set(), "まだ何も無いとき"), ({"a", "b"}, {"a", "b"}, "もう望む姿のとき"),
    ({"a", "b", "c"}, {"b"}, "一つだけ残っているとき"), ({"a"}, {"a", "b", "c"}, "多すぎるとき"),
    ({"b", "c"}, {"a", "b"}, "足りないものと、余るものが両方あるとき"), (set(), {"a"}, "何も望まないとき"))
TERMS = {
    "keep three copies": "ReplicaSet",
    "roll out a new image": "Deployment",
    "one address for copies": "Service",
    "choose a machine": "scheduler",
    "start containers here": "kubelet",
    "remember the wish": "etcd",
}


@exercise
def loop(plan: Plan) -> Steps:
    """A function of the desired and the observed names that says what to start and what to remove."""
    for desired, observed, when in CASES:
        given = plan(set(desired), set(observed))
        yield isinstance(given, tuple) and len(given) == 2, "起動する名前と消す名前の、二つの集合を組にして返してください。"
        start, remove = (set(one) for one in given)
        yield not start & observed, f"{when}に、もう動いている `{_one(start & observed)}` を起動しようとしました。"
        yield not remove - observed, f"{when}に、無いはずの `{_one(remove - observed)}` を消そうとしました。"
        yield not remove & desired, f"{when}に、望んでいる `{_one(remove & desired)}` を消そうとしました。"
        after = (observed | start) - remove
        yield desired <= after, f"{when}に、`{_one(desired - after)}` が足りないままです。"
        yield after <= desired, f"{when}に、`{_one(after - desired)}` が余ったままです。"
    return "差だけを返し、差が無ければ何もしません。だから、何度呼んでも、途中で止まっても、同じところへ着きます。"


def _one(names: Collection[str]) -> str:
    return min(names, default="")


@exercise
def shared(first: int, second: int, answer: Collection[str]) -> Steps:
    """Which namespaces two processes share, by proc_pid_ns(5)."""
    real = {kind for kind in namespaces.KINDS
            if os.readlink(f"/proc/{first}/ns/{kind}") == os.readlink(f"/proc/{second}/ns/{kind}")}
    given = set(answer)
    strange = given - set(namespaces.KINDS)
    known = "、".join(f"`{kind}`" for kind in namespaces.KINDS)
    yield not strange, f"`{_one(strange)}` という namespace はありません。{known} から選びます。"
    yield not given - real, f"`{_one(given - real)}` は別々です。`os.readlink` で二つのリンクの番号を比べてください。"
    yield given == real, f"`{_one(real - given)}` も同じです。"
    return "一台の機械の中にもう一台ある、と見えるものだけを分け合い、ファイルとプロセスは別のままです。"


@exercise
def terms(answer: Mapping[str, str]) -> Steps:
    """Whose job is what in Kubernetes."""
    for job, real in TERMS.items():
        given = answer.get(job, "")
        yield given != "", f"`{job}` の答えがまだありません。"
        yield given in TERMS.values(), f"`{given}` は、選べる名前にありません。"
        yield given == real, f"`{job}` は `{given}` の仕事ではありません。{_clue(real)}"
    return "望む姿を覚える者、差を埋める者、置き場所を決める者、手を動かす者。一台の compose では、全部あなたの `up` でした。"


def _clue(real: str) -> str:
    return {
        "ReplicaSet": "数を保つ者です。", "Deployment": "二つの世代の ReplicaSet を持ち替える者です。",
        "Service": "コンテナが入れ替わっても変わらない入口です。", "scheduler": "機械を選ぶだけで、起動はしません。",
        "kubelet": "どの機械にも一人ずつ居ます。", "etcd": "覚えるだけで、何もしません。"}[real]

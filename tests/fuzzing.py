"""What the fuzz tests share: how many cases, what strangers write, and which errors are ours.

`make test` tries a few cases, always the same ones. `make fuzz` (hypothesis' profile "fuzz") tries
many, others every time, with a bar for each property; what fails is printed with how to repeat it.
"""

import functools
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import dk_detectron

# Cases of all properties of a kind together, by profile.
READERS = {"test": 100, "fuzz": 2000}
OPERATORS = {"test": 300, "fuzz": 5000}
# Seconds for a case, most of which take milliseconds.
DEADLINE = 60
PACKAGE = str(Path(dk_detectron.__file__).parent)


def register_profiles() -> None:
    common = {
        "deadline": timedelta(seconds=DEADLINE),
        "suppress_health_check": list(HealthCheck),
        "print_blob": True,
    }
    settings.register_profile("test", derandomize=True, database=None, **common)
    settings.register_profile("fuzz", **common)
    settings.load_profile("test")


class Hang(BaseException):
    """No ``Exception``, which some readers take for a fault of the file."""


@contextmanager
def limited() -> Iterator[None]:
    """Ends what hangs."""

    def stop(*_):
        raise Hang(f"still at work after {DEADLINE} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(DEADLINE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def cases(counts: dict[str, int], share: float, **strategies) -> Callable:
    """``hypothesis.given``, so many times: that share of the kind's cases."""

    def decorate(function: Callable) -> Callable:
        profile = settings.get_current_profile_name()
        count = round(counts[profile] * share)
        bar = None

        @functools.wraps(function)
        def counted(*args, **kwargs):
            nonlocal bar
            bar = bar or tqdm(total=count, desc=function.__name__, disable=profile != "fuzz")
            bar.update()
            with limited():
                function(*args, **kwargs)

        return settings(max_examples=count)(given(**strategies)(counted))

    return decorate


def attempt(function: Callable, *arguments, names: str = "") -> Any:
    """What a call returns; or its error, which must be ours and name what is at fault."""
    try:
        result = function(*arguments)
        event("read")
        return result
    except (OSError, ValueError) as error:
        event("refused")
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        assert raised_in.startswith(PACKAGE), f"raised by {raised_in}: {error!r}"
        assert names in str(error) and not isinstance(error, UnicodeError), repr(error)
        return error


# ---- what strangers write
# --------------------------------------------------------------------------

ODD = st.sampled_from(
    [
        None, True, False, 0, 1, -1, 2, 3, 7, 40, 255, 2**31, 2**32, 2**63, -(2**63), 10**30,
        10**400, 0.0, -0.0, 0.5, 1.5, -3.25, 1e-300, 1e19, 1e308, float("nan"), float("inf"),
        -float("inf"), "", "1", "-2.5", "1e400", "nan", "abc", "a\0b", "\ud800", "é", "../x",
        "9" * 400, "_BASE_", [], {}, [[]], [{}], {"a": []}, [None], ["1", 2], [0.5] * 4,
        [1, 2, 3, "4"],
    ]
)  # fmt: skip
ANYTHING = st.recursive(
    ODD | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: (
        st.lists(values, max_size=5) | st.dictionaries(st.text(max_size=5), values, max_size=3)
    ),
    max_leaves=6,
)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a tree of dicts and lists."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(entries):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def variants(value: Any) -> list:
    """The same in other words, and what is near to it."""
    if isinstance(value, bool) or value is None:
        return [int(bool(value)), str(value)]
    if isinstance(value, int | float):
        near = [value + 1, value - 1, -value, value * 30, [value], str(value)]
        return near + [float(value), value / 30] if abs(value) < 10**15 else near
    if isinstance(value, str):
        return [value.upper(), f" {value}", value[1:], [value], {"name": value}]
    if isinstance(value, list):
        return [
            [value],
            value[::-1],
            value[:-1],
            value * 2,
            [str(v) for v in value],
            {"list": value},
        ]
    return [[value], list(value), list(value.values())]


@st.composite
def spoilt(draw, tree: Any, values: st.SearchStrategy = ODD | ANYTHING, most: int = 3) -> Any:
    """A tree of dicts and lists with a few places changed, taken out, put in, or there twice."""
    tree = deepcopy(tree)
    for _ in range(draw(st.integers(0, most))):
        found = list(places(tree))
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        what = draw(st.sampled_from(["vary", "vary", "change", "take", "put", "twice"]))
        if what == "vary":
            container[key] = draw(st.sampled_from(deepcopy(variants(container[key]))))
        elif what == "change":
            container[key] = deepcopy(draw(values))
        elif what == "take":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, deepcopy(draw(values) if what == "put" else container[key]))
        else:
            others = [other for _, other in found if isinstance(other, str)]
            value = draw(values) if what == "put" else container[key]
            container[draw(st.sampled_from(others or ["name"]))] = deepcopy(value)
    return tree


@st.composite
def damaged(draw, raw: bytes, most: int = 3) -> bytes:
    """Bytes that are cut, flipped, overwritten, left out or repeated, if anything is done."""
    content = bytearray(raw)
    for _ in range(draw(st.integers(0, most))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([1, 2, 4, 30, len(content)])))
        what = draw(st.sampled_from(["cut", "flip", "zero", "write", "leave", "repeat"]))
        if what == "cut":
            del content[start:]
        elif what == "flip" and start < len(content):
            content[start] ^= 1 << draw(st.integers(0, 7))
        elif what == "zero":
            content[start:end] = bytes(end - start)
        elif what == "write":
            content[start:start] = draw(st.binary(min_size=1, max_size=8))
        elif what == "leave":
            del content[start:end]
        elif what == "repeat":
            content[start:start] = content[start:end]
    return bytes(content)

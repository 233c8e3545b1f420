"""What the fuzz tests put into files: JSON of any shape, damaged copies of sound files, bytes of any kind."""

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The same examples in every run: a failure in CI can be repeated.
fuzz = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

texts = st.text(max_size=8) | st.sampled_from(["", " ", "\ud800", "a\x00b", "en", "0-0", "x" * 2000])
numbers = (
    st.integers(-3, 3)
    | st.sampled_from([2**31, 2**63, 2**64, -(2**70), 10**400, float("nan"), float("inf"), 1e308, -0.0])
    | st.floats()
)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """A copy cut off somewhere, or with some bytes changed, or with a piece twice."""
    kind = draw(st.sampled_from(["cut", "changed", "twice"]))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "cut":
        return content[:place]
    if kind == "twice":
        return content[:place] + content[place // 2 :]
    copy = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        copy[draw(st.integers(0, len(copy) - 1))] = draw(st.integers(0, 255))
    return bytes(copy)


@st.composite
def altered(draw, row: dict) -> dict:
    """The row with fields replaced, added or left out."""
    row = dict(row)
    for field in draw(st.lists(st.sampled_from([*row, "other"]), min_size=1, max_size=2)):
        if draw(st.booleans()):
            row[field] = draw(json_values)
        else:
            row.pop(field, None)
    return row


@st.composite
def json_lines(draw, row: dict) -> bytes:
    """A file of rows, of which some break the format, as JSON or as hardly JSON."""
    rows = draw(st.lists(altered(row) | json_values | st.just(row), max_size=3))
    lines = [json.dumps(value).encode() for value in rows]
    lines += draw(
        st.lists(
            st.sampled_from(
                [
                    b"",
                    b"\xff\xfe",
                    b"{",
                    b'{"image_id": "a", "image_id": 7}',
                    b"9" * 5000,
                    b"[" * 3000,
                    b"NaN",
                    json.dumps(row).encode("utf-16"),
                ]
            ),
            max_size=1,
        )
    )
    return b"\n".join(lines)

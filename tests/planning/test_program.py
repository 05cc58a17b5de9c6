# SPDX-License-Identifier: Apache-2.0
"""The walk over compiled programs, on texts that libtpu 0.0.42.1 made of small functions (cut to what is read)."""

from __future__ import annotations

import collections
import pathlib
import re

import pytest

from vlp_jax.planning import hlo, program

PROGRAMS = pathlib.Path(__file__).parent / "programs"
NAMES = sorted(path.stem for path in PROGRAMS.glob("*.txt"))


def stored(name: str) -> str:
    return (PROGRAMS / f"{name}.txt").read_text(encoding="utf-8")


def cycles_by_computation(text: str) -> dict[str, int]:
    """Sums of the estimates, found by another road than the parser's."""
    sums: collections.Counter = collections.Counter()
    name = ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%(\S+) \(", line):
            name = head[1]
        for cycles in re.findall(r'"estimated_cycles":"(\d+)"', line):
            sums[name] += int(cycles)
    return dict(sums)


@pytest.mark.parametrize("name", NAMES)
def test_the_walk_loses_nothing(name):
    text = stored(name)
    found = program.read(text)
    assert found.missed_cycles == 0
    if not found.loops:
        (entry,) = re.findall(r"^ENTRY %(\S+)", text, re.MULTILINE)
        assert found.cycles == cycles_by_computation(text)[entry]
        # Only what an exchange does to two numbers, on its own core, stands elsewhere.
        if name != "another_core":
            assert found.cycles == hlo.total_cycles(text) > 0


def test_nested_loops_multiply():
    # for 5: (for 2..13: tanh(x @ w)) * 0.5; then 20, 17, ... while above 0: sin(x @ w)
    text = stored("loops")
    found = program.read(text)
    assert [loop.trips for loop in found.loops] == [12, 5, 7]
    sums = cycles_by_computation(text)
    bodies = dict(re.findall(r"body=%([^ ,]+).*?stack_frame_id=(\d+)", text))
    assert len(bodies) == 3
    inner = next(where for where in bodies if f"body=%{where}" not in text.split("ENTRY")[1])
    (outer,) = (
        w
        for w in bodies
        if re.search(rf"^%{re.escape(w)} [^\n]*{{\n(?:  .*\n)*  .*body=%{re.escape(inner)}", text, re.M)
    )
    (last,) = set(bodies) - {inner, outer}
    times = {inner: 60, outer: 5, last: 7}
    assert found.cycles == sum(n * times.get(where, 1) for where, n in sums.items())


def test_a_loop_without_a_count_is_said_to_be_one():
    (loop,) = program.read(stored("search")).loops
    assert loop.trips is None and loop.cycles > 0


LOOP = """
%body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {{
  %p = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{{0}} get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
  %by = s32[] constant({step})
  %next = s32[] {change}(%i, %by)
  %y = f32[8]{{0}} sine(%x), backend_config={{"window_config":{{"estimated_cycles":"10"}}}}
  ROOT %t = (s32[], f32[8]{{0}}, s32[]) tuple(%next, %y, %n)
}}

%compared (a: s32[], b: s32[]) -> pred[] {{
  %b = s32[] parameter(1)
  %a = s32[] parameter(0)
  ROOT %c = pred[] compare(%a, %b), direction={direction}
}}

%condition (q: (s32[], f32[8], s32[])) -> pred[] {{
  %q = (s32[], f32[8]{{0}}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %most = s32[] {most}
  ROOT %f = pred[] fusion({sides}), kind=kLoop, calls=%compared
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %bound = s32[] constant({bound})
  %in = (s32[], f32[8]{{0}}, s32[]) tuple(%copied, %x, %bound)
  %while = (s32[], f32[8]{{0}}, s32[]) while(%in), condition=%condition, body=%body
  ROOT %out = f32[8]{{0}} get-tuple-element(%while), index=1
}}
"""
HOLDS = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "NE": lambda a, b: a != b,
}


@pytest.mark.parametrize("carried", [False, True], ids=["bound inside", "bound carried"])
@pytest.mark.parametrize("turned", [False, True], ids=["i ? n", "n ? i"])
@pytest.mark.parametrize(
    "start, bound, step, direction",
    [(0, 7, 1, "LT"), (0, 7, 2, "LT"), (3, 12, 3, "LE"), (20, 0, -3, "GT"), (6, 0, -2, "GE"), (0, 6, 2, "NE"),
     (9, 9, 1, "LT"), (5, -1, -1, "NE"), (-4, 4, 1, "LE"), (3, 1, 1, "LT")],
)  # fmt: skip
def test_trips_are_those_of_the_loop_run_by_hand(start, bound, step, direction, turned, carried):
    i, trips = start, 0
    while HOLDS[direction](i, bound):
        i, trips = i + step, trips + 1
    direction = (
        {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction) if turned else direction
    )
    text = LOOP.format(
        start=start,
        bound=bound,
        step=abs(step),
        change="add" if step > 0 else "subtract",
        direction=direction,
        most="get-tuple-element(%q), index=2" if carried else f"constant({bound})",
        sides="%most, %j" if turned else "%j, %most",
    )
    found = program.read(text)
    assert [loop.trips for loop in found.loops] == [trips] and found.cycles == 10 * trips


def test_a_count_in_the_text_is_taken():
    text = LOOP.format(
        start=0, bound=7, step=1, change="multiply", direction="LT", most="constant(7)", sides="%j, %most"
    )
    assert program.read(text).loops[0].trips is None
    known = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"11"}}')
    assert program.read(known).loops[0].trips == 11


def test_a_payload_with_brackets_and_lines_of_its_own_hides_nothing():
    text = stored("kernel")
    before = program.read(text)
    hostile = text.replace(
        '"body":"', '"body":"module {\\n}\n}\nENTRY %fake (x: f32[]) -> f32[] {\n  \\"quoted } \\" (((\n'
    )
    assert hostile != text
    after = program.read(hostile)
    assert after.operations == before.operations and after.missed_cycles == 0
    assert program.unestimated(after)["tpu_custom_call"] == 1


def test_a_collective_behind_products_counts_once_and_a_slice_of_a_sum_is_a_reduce_scatter():
    text = stored("gathered")
    found = program.read(text).collectives
    kinds = collections.Counter(each.kind for each in found)
    assert kinds == {"all-gather": 2, "reduce-scatter": 2}
    # It stands in the text more often: start, pieces and end of one asynchronous exchange.
    assert len(re.findall(r" all-gather(?:-start)?\(", text)) > 2
    assert {each.bytes for each in found} == {1024 * 4096 * 2} and {each.dtypes for each in found} == {"bf16"}
    assert {each.group for each in found} == {8} and {each.runs for each in found} == {1}


def test_exchanges_of_another_core_count_and_its_time_does_not():
    found = program.read(stored("another_core"))
    (exchange,) = found.collectives
    assert exchange.kind == "all-reduce" and exchange.bytes == 2 * 1024 * 1024 * 2
    assert program.unestimated(found)["all-reduce on another core"] == 1


def test_what_has_no_estimate_is_listed():
    table = program.unestimated(program.read(stored("rows")))
    assert table["scatter fusion"] == 1 and table["rng-bit-generator"] == 1
    assert not set(table) & {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done"}


@pytest.mark.parametrize(
    "attributes, size",
    [("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4), ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
     ("replica_groups=[2,16]<=[32]", 16), ("replica_groups={{0,1,2},{3,4,5}}", 3), ("source_target_pairs={{0,1}}", 0)],
)  # fmt: skip
def test_groups(attributes, size):
    line = f"  ROOT %r = f32[8]{{0}} all-reduce(%x), {attributes}, to_apply=%add"
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n{line}\n}}\n"
    text = "%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n\n" + text
    assert program.read(text).collectives[0].group == size


@pytest.mark.parametrize(
    "op_name, expected",
    [
        ("jit(step)/jvp(Vilt.pretrain)/Vilt.fuse/fusion/stack/while/body/closed_call/layers/layers/mlp/dot_general",
         ("forward", "fusion/stack/layers/mlp")),
        ("jit(step)/transpose(jvp(Vilt.words))/heads/mlm/decoder/btd,dv->btv/dot_general", ("backward", "heads/mlm/decoder")),
        ("jit(step)/jvp(Vilt.pretrain)/concatenate", ("forward", "Vilt.pretrain")),
        ("jit(step)/jvp()/reduce_sum", ("forward", "")),
        ("jit(step)/jit(_where)/select_n", ("", "")),
        ("state.params['a']['kernel']", ("", "")),
    ],
)  # fmt: skip
def test_module_paths(op_name, expected):
    assert program.module_path(op_name) == expected


def test_time_outside_modules_is_given_to_file_and_function():
    found = program.read(stored("loops"))
    assert {place for _, place in program.by_path(found)} >= {"sample.py outer"}
    assert sum(program.by_path(found).values()) == found.cycles


def test_sizes_and_shapes():
    line = "  %t = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[], (s8[4]{0}, f8e4m3fn[<=5]{0})) custom-call(%a, %b), x=1"
    found = hlo._instruction(line)
    assert found.opcode == "custom-call" and found.operands == ("a", "b") and not found.root
    assert [(s.dtype, s.size, s.bytes) for s in found.shapes] == [
        ("bf16", 6, 12),
        ("pred", 1, 1),
        ("s8", 4, 4),
        ("f8e4m3fn", 5, 5),
    ]


def test_no_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY"):
        program.read("nothing here")

"""The whitelist, the parser, and what they refuse."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from .. import DeviceArray, PtxError, UnsupportedInstruction, engine, load, statistics, toolkit
from .. import cache as store
from ..ptx import REGISTRY, opcodes, parse, translate
from ..ptx.forms import Registry
from ..pytest_support import require_nvcc
from .harness import kernel

pytestmark = pytest.mark.gpusim


def test_form_grammar() -> None:
    registry = Registry()
    registry.add("(add|sub)[.rn][.a|.b[.c]].f32")(lambda: None)
    form = next(iter(registry))
    assert len(list(registry)) == 1
    spellings = list(form.spellings())
    assert len(spellings) == len(set(spellings)) == 2 * 2 * 4
    assert "sub.rn.b.c.f32" in spellings and "add.f32" in spellings
    assert all(registry.find(s) is form for s in spellings)
    for wrong in ("add.c.f32", "add.rn", "add.f32.rn", "mul.f32", "add.rn.rn.f32"):
        assert registry.find(wrong) is None


# Real PTX outside the whitelist. Each was, or could have been, mistranslated by ignoring modifiers.
UNSUPPORTED = [
    "add.rz.ftz.f16 %h1, %h2, %h3;",
    "add.rz.bf16 %h1, %h2, %h3;",
    "min.xorsign.abs.f32 %f1, %f2, %f3;",
    "cvt.rn.satfinite.f16.f32 %h1, %f1;",
    "cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2;",
    "cvt.rs.f16x2.f32 %r1, %f1, %f2, %r2;",
    "ld.global.L3::x.u32 %r1, [x];",
    "ld.shared::cluster.u32 %r1, [x];",
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [x], %r1, [y];",
    "atom.global.cluster.add.u32 %r1, [x], 1;",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r1}, {%r1}, {%r1};",
    "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%g1}, {%g1}, {%g1}, {%g1};",
    "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1}, {%r1}, {%r1}, {%f1}, %r1, 0;",
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;",
    "barrier.cluster.arrive;",
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [x], [%r1], 16;",
    "cp.async.mbarrier.arrive.noinc.shared.b64 [%r1];",
    "mapa.u64 %q1, %q2, 0;",
    "tex.2d.v4.f32.f32 {%f1, %f2, %f3, %f4}, [x, {%f5, %f6}];",
    "call.uni f, ();",
    "shfl.bfly.b32 %r1, %r2, 1, 31;",
    "lop3.or.b32 %r1|%p1, %r2, %r3, %r4, 0x80, %p2;",
    "discard.global.L2 [x], 128;",
    "mov.u32 %r1, %envreg0;",
]


@pytest.mark.parametrize("code", UNSUPPORTED, ids=lambda c: c.split(" ")[0])
def test_unsupported_instruction_is_named(code: str) -> None:
    opcode = code.split(" ")[0].rstrip(";")
    with pytest.raises(UnsupportedInstruction) as error:
        load(kernel(code))
    assert str(error.value).startswith(f"unsupported instruction: {opcode}: ")
    assert "in kernel test" in str(error.value)


def test_all_unsupported_instructions_are_listed_at_once() -> None:
    with pytest.raises(UnsupportedInstruction, match=r"tcgen05.fence.*barrier.cluster.wait"):
        load(kernel("tcgen05.fence::before_thread_sync;\nbarrier.cluster.wait;"))


def test_clusters_are_refused() -> None:
    ptx = kernel("").replace(")\n{", ") .reqnctapercluster 2\n{", 1)
    with pytest.raises(UnsupportedInstruction, match="clusters"):
        load(ptx)
    load(ptx.replace("reqnctapercluster 2", "reqnctapercluster 1"))


def test_undeclared_register_is_named() -> None:
    with pytest.raises(UnsupportedInstruction, match="operand %r99"):
        load(kernel("mov.u32 %r1, %r99;"))


# ---- coverage of the whitelist


def executed() -> set[str]:
    """Opcodes of the programs that the tests of this folder execute and compare."""
    found: set[str] = set()
    folder = str(Path(__file__).parent)
    for module in pkgutil.iter_modules([folder]):
        if module.name.startswith("test_gpusim_"):
            loaded = importlib.import_module(f"{__package__}.{module.name}")
            for program in getattr(loaded, "PROGRAMS", []):
                found |= opcodes(program)
    return found


def test_every_form_is_executed_by_a_test() -> None:
    tested = executed()
    untested = [f.pattern for f in REGISTRY if not any(f.regex.fullmatch(o) for o in tested)]
    assert untested == []


def test_no_two_forms_match_one_opcode() -> None:
    """Else the order of registration would decide which translation is used."""
    for opcode in executed():
        base = opcode.split(".")[0]
        matching = {
            id(f.handler) for f in REGISTRY.forms.get(base, []) if f.regex.fullmatch(opcode)
        }
        assert len(matching) <= 1, opcode


def sample_spellings(limit: int = 40) -> list[str]:
    return [s for f in REGISTRY for s in itertools.islice(f.spellings(), limit)]


def test_whitelist_finds_its_own_spellings() -> None:
    assert all(REGISTRY.find(spelling) for spelling in sample_spellings())


def test_ptxas_accepts_the_test_programs(tmp_path: Path) -> None:
    """An independent reader of PTX: what the tests execute is not a dialect of our own."""
    require_nvcc()
    ptxas = toolkit.root() / "bin" / "ptxas"
    folder = str(Path(__file__).parent)
    refused = []
    for module in pkgutil.iter_modules([folder]):
        if not module.name.startswith("test_gpusim_") or "checker" in module.name:
            continue
        loaded = importlib.import_module(f"{__package__}.{module.name}")
        for number, program in enumerate(getattr(loaded, "PROGRAMS", [])):
            source = tmp_path / "program.ptx"
            source.write_text(program)
            target = parse_target(program)
            command = [ptxas, f"-arch={target}", "-O0", source, "-o", tmp_path / "program.cubin"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                refused.append(f"{module.name}[{number}]: {result.stderr[:600]}")
    assert not refused, "\n".join(refused)


def parse_target(program: str) -> str:
    return program.split(".target", 1)[1].split()[0].rstrip(",")


# ---- parser


def test_parser_reads_a_module() -> None:
    module = parse(
        """
// comment with .entry nonsense(
.version 8.7
.target sm_80
.address_size 64
.file 1 "a//b.cu"
.global .align 4 .b8 table[8] = {1, 2, 3, 4};
.extern .shared .align 16 .b8 dynamic[];
.visible .entry first(.param .u32 n, .param .align 8 .b8 big[24], .param .u64 .ptr .align 1 p)
.maxntid 128, 2, 1
{ .reg .b32 %r<3>; /* block
comment */ $L0: { .reg .b32 t; L1: mov.b32 t, %r1; } @!%p1 bra $L0; ret; }
.entry second() { ret; }
"""
    )
    first = module.entries["first"]
    assert list(module.entries) == ["first", "second"] and module.files == {1: "a//b.cu"}
    assert [(p.offset, p.size) for p in first.params.values()] == [(0, 4), (8, 24), (32, 8)]
    assert first.param_bytes == 40 and first.max_threads == 256
    assert first.registers == {"%r0": "b32", "%r1": "b32", "%r2": "b32", "t__scope1": "b32"}
    move, branch = first.body[2], first.body[3]
    assert move.args == ["t__scope1", "%r1"] and branch.guard == "%p1" and branch.negated
    assert [v.name for v in module.variables] == ["table", "dynamic"]


@pytest.mark.parametrize("text", [".entry broken() { ret; ", ".entry e() { mov.b32 %r1, %r2 }"])
def test_parser_refuses_broken_text(text: str) -> None:
    with pytest.raises(PtxError):
        parse(text)


def test_translation_does_not_depend_on_anything_else() -> None:
    """Same text, same C++: otherwise the cache would miss."""
    module = parse(kernel("add.u32 %r1, tid, 1;"))
    assert translate(module, module.entries["test"]) == translate(module, module.entries["test"])


# ---- cache


def test_second_load_compiles_nothing() -> None:
    ptx = kernel("mov.u32 %r1, 123454321;")
    load(ptx)
    before = (statistics.translated, statistics.compiled)
    load(ptx)
    assert (statistics.translated, statistics.compiled) == before


def test_new_cache_folder_starts_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kernel is compiled again into an empty folder, and then found there."""
    monkeypatch.setattr(engine, "_kernels", {})
    monkeypatch.setenv("GPUSIM_CACHE", str(tmp_path))
    engine._kernel_header.cache_clear()
    try:
        ptx = kernel("mul.wide.u32 %q1, tid, 4; add.u64 %q2, y, %q1; st.global.u32 [%q2], tid;")
        out = DeviceArray(np.zeros(32, np.uint32))
        compiled = statistics.compiled
        for _ in range(2):
            load(ptx).launch(1, 32, [out, out])
            engine._kernels.clear()
        assert statistics.compiled == compiled + 1
        assert list(tmp_path.glob("kernel-*.so")) and list(tmp_path.glob("header-*/kernel.h.gch"))
        assert (out.array == np.arange(32)).all()
    finally:
        engine._kernel_header.cache_clear()


def test_cache_key_covers_every_header_of_a_kernel() -> None:
    """Forgetting one would run kernels compiled from its old text."""
    seen, open_ = set(), ["kernel.h"]
    while open_:
        name = open_.pop()
        seen.add(name)
        text = (store.RUNTIME / name).read_text()
        open_ += set(re.findall(r'#include "([\w.]+)"', text)) - seen
    assert seen == set(engine._KERNEL_HEADERS)


def test_arguments_are_checked() -> None:
    loaded = load(kernel("", "x n:u32"))
    with pytest.raises(TypeError, match="takes 2 arguments"):
        loaded.launch(1, 32, [1])
    with pytest.raises(TypeError, match="argument of 4 bytes"):
        loaded.launch(1, 32, [b"abcd", 1])

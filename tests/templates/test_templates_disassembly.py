"""What is read from a disassembly: registers that nothing has written, loops, and exponentials that nothing hides."""

import pytest

from flexmask.templates.disassembly import exposed_of, loops_of, opcodes_of, undefined_of

# two loops whose descriptor the assembler computes once, in front of the first one; {} is what jumps past it
MERGED = """
        /*0000*/                   ULDC UR4, c[0x0][0x210] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R2, 0x1, PT ;
        /*0020*/              {}   BRA `(.L_x_1) ;
        /*0030*/                   UIADD3 UR24, UP0, UR4, 0x2, URZ ;
        /*0040*/                   UIADD3.X UR25, URZ, 0x40000040, URZ, UP0, !UPT ;
.L_x_0:
        /*0050*/                   UIADD3.64 UR26, UR24, 0x80, URZ ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], R24, gsb0 ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0080*/                   UIADD3.64 UR26, UR4, 0x80, URZ ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R24, {}gdesc[UR24], R24, gsb0 ;
        /*00a0*/                   EXIT ;
"""
SWITCH = """
        /*0000*/                   BRX R8 -0x280                  (*"BRANCH_TARGETS .L_x_2,.L_x_3"*);
.L_x_2:
        /*0010*/                   R2UR UR6, R3 ;
.L_x_3:
        /*0020*/                   SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR6+0x20], RZ ;
        /*0030*/                   EXIT ;
.L_x_4:
        /*0040*/                   UMOV UR9, UR63 ;
"""
LOOP = """
.L_x_0:
        /*0000*/                   MUFU.EX2 R1, R1 ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], R24 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR28], R24, gsb0 ;
        /*0030*/                   MUFU.EX2 R2, R2 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   MUFU.EX2 R3, R3 ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("jump", "a", "found"),
    [("@!P0", "", 1), ("@!P0", "R4, ", 0), ("", "", 1)],  # with A in registers UR24 is not looked at; nor is what is not reached
)
def test_registers_that_nothing_has_written(jump, a, found):
    assert undefined_of(MERGED.format(jump, a)) == ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR24], R24, gsb0 ;",) * found


def test_a_kernel_that_writes_before_it_reads():
    assert undefined_of(MERGED.replace(".L_x_1) ;", ".L_x_2) ;").format("@!P0", "") + ".L_x_2:\n") == ()
    assert undefined_of("") == ()


def test_what_is_moved_is_looked_at_where_it_is_used():
    moved = MERGED.replace("{}gdesc[UR24]", "gdesc[UR40]").format("@!P0")
    moved = moved.replace(
        "        /*0090*/",
        "        /*0088*/                   UMOV UR40, UR24 ;\n        /*0089*/                   UMOV UR41, UR25 ;\n        /*0090*/",
    )
    assert undefined_of(moved.replace("UIADD3.64 UR26, UR4", "UIADD3.64 UR42, UR4")) == (
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR40], R24, gsb0 ;",
    )
    assert undefined_of(moved.replace("gdesc[UR40]", "R4, gdesc[UR2]").replace("UIADD3.64 UR26, UR4", "UIADD3.64 UR4, UR4")) == ()


def test_every_branch_of_a_switch_is_followed():
    assert undefined_of(SWITCH) == ("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR6+0x20], RZ ;",)
    assert undefined_of(SWITCH.replace(",.L_x_3", "")) == ()


def test_loops_and_what_they_hide():
    (loop,) = loops_of(LOOP)
    assert exposed_of(loop) == 2
    assert opcodes_of(loop)["HGMMA"] == 2

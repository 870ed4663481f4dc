"""Square root, reciprocal and copied signs in one instruction each.

On NVIDIA they are written in PTX. The root and the reciprocal flush subnormal numbers to zero and have 22 good bits,
enough for the update of an optimizer: what Triton makes of `sqrt` and of a division takes three to seven instructions
more, most of them for those numbers. Elsewhere, and in Triton's interpreter, they are what Triton makes of them.
"""

from lq_kernels._triton import tl, triton


def ptx_arch() -> int:
    """The compute capability times ten where kernels may use PTX, 0 on AMD's GPUs and in the interpreter."""
    if triton.knobs.runtime.interpret:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0


def has_ptx() -> bool:
    return ptx_arch() > 0


@triton.jit
def square_root(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sqrt(x)


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def with_sign(magnitude, x, PTX: tl.constexpr):
    """magnitude >= 0 with the sign of x, both float32."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x80000000, $2, 0xEA;", "=f,f,f", [x, magnitude], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        sign = x.to(tl.uint32, bitcast=True) & 0x80000000
        return (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)

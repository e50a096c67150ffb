"""depth_attention's kernels at csm-1b's shape: K = 32, H = 8, Hkv = 2, d = 128."""

import math

from csm_kernels.gpu.depth_attention import _backward_kernel, _block, _forward_kernel, _num_warps
from kernel_cases import AotCase

LENGTH, WIDTH, HEADS, KV_HEADS = 32, 128, 8, 2
NO_ASYNC_COPY = "no asynchronous copies before sm_80, so the loop is not pipelined"


def case(dtype: str, arch: int, backward: bool) -> AotCase:
    pointers = {f"p_{name}": f"*{dtype}" for name in "qkv"} | {"p_cos": "*fp32", "p_sin": "*fp32"}
    pointers |= dict.fromkeys(("p_do", "p_dq", "p_dk", "p_dv") if backward else ("p_out",), f"*{dtype}")
    strides = [f"s_{name}{axis}" for name in ("qkvd" if backward else "qkv") for axis in "mkh"]
    meta = {"LENGTH": LENGTH, "KV_HEADS": KV_HEADS, "GROUP": HEADS // KV_HEADS, "K": _block(LENGTH), "D": WIDTH}
    wants = dict.fromkeys(("WANTS_Q", "WANTS_K", "WANTS_V"), True) if backward else {}
    return AotCase(
        f"depth_attention {'backward' if backward else 'forward'}",
        _backward_kernel if backward else _forward_kernel,
        pointers | dict.fromkeys(strides, "i32"),
        meta | {"SCALE": 1 / math.sqrt(WIDTH)} | wants,
        num_warps=_num_warps(4 if dtype == "fp32" else 2, backward),
        aligned=(*pointers, *strides),
        may_spill=NO_ASYNC_COPY if backward and arch == 75 else "",
    )


def cases(dtype: str, arch: int) -> list[AotCase]:
    return [case(dtype, arch, backward) for backward in (False, True)]

"""AdamW's kernel in every form that a run can choose. Cards without bf16 train float32 weights, also under fp16."""

from csm_kernels.gpu import adamw as op
from kernel_cases import AotCase

FORMS = {  # by type of the weights: name, rounding, moments in 8 bits
    "bf16": [
        ("stochastic", op.STOCHASTIC, False),
        ("stochastic, 8 bits", op.STOCHASTIC, True),
        ("kahan", op.KAHAN, False),
        ("kahan, 8 bits", op.KAHAN, True),
        ("nearest", op.NEAREST, False),
    ],
    "fp32": [("float32", op.NEAREST, False), ("float32, 8 bits", op.NEAREST, True)],
}
SETTINGS = ("keep", "size", "log_beta1", "log_beta2", "fresh", "fresh_square", "eps")


def cases(dtype: str, arch: int) -> list[AotCase]:
    weights = "bf16" if dtype == "bf16" else "fp32"
    listed = []
    for name, rounding, eight in FORMS[weights]:
        moments = "*u8" if eight else "*fp32"
        signature = {
            **dict.fromkeys(("p_weight", "p_grad"), f"*{weights}"),
            **dict.fromkeys(("p_mean", "p_square"), moments),
            **dict.fromkeys(("p_mean_scale", "p_square_scale", "p_mean_map", "p_square_map"), "*fp32"),
            "p_rest": "*bf16",
            "p_live": "*u8",
            **dict.fromkeys(("p_step", "p_found_inf", "p_grad_scale"), "*fp32"),
            "n": "i32",
            **dict.fromkeys(SETTINGS, "fp32"),
            **dict.fromkeys(("counters", "salt", "tiles"), "i32"),
        }
        listed.append(
            AotCase(
                f"adamw, {name}",
                op._adamw_kernel,
                signature,
                {
                    "ROUNDING": rounding,
                    "EIGHT": eight,
                    "LIVE": True,
                    "MAY_SKIP": True,
                    "SCALES": True,
                    "BLOCK": op.BLOCK,
                    "TILE": op.DRAW_TILE,
                    "QUANTIZED": op.MOMENT_BLOCK,
                },
                num_warps=op.WARPS,
                aligned=(*(name for name, kind in signature.items() if kind.startswith("*")), "n"),
            )
        )
    return listed

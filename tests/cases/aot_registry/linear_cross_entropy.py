"""linear_cross_entropy's kernel at csm-1b's shape: V = 2051, padded to 2112 columns."""

from csm_kernels.gpu import linear_cross_entropy as op
from kernel_cases import AotCase

VOCAB, COLUMNS = 2051, 2112


def cases(dtype: str, arch: int) -> list[AotCase]:
    block, num_warps = op.launch_shape(COLUMNS)
    signature = {
        "p_logits": f"*{dtype}",
        "p_targets": "*i64",
        "p_weights": "*fp32",
        "p_losses": "*fp32",
        "rows": "i32",
        "scale": "fp32",
    }
    meta = {"VOCAB": VOCAB, "COLUMNS": COLUMNS, "BLOCK": block}
    return [
        AotCase(
            f"linear_cross_entropy softmax, {name}",
            op._softmax_cross_entropy_kernel,
            signature,
            meta | {"WANTS_GRAD": wanted},
            num_warps=num_warps,
        )
        for name, wanted in (("loss and gradient", True), ("loss", False))
    ]

"""frame_embed's kernels at csm-1b's shapes: K = 32, V = 2051, D = 2048, int32 tokens."""

from csm_kernels.gpu import frame_embed as op
from kernel_cases import AotCase

CODEBOOKS, WIDTH = 32, 2048


def cases(dtype: str, arch: int) -> list[AotCase]:
    table = f"*{dtype}"
    block_d, _, num_warps = op._columns(WIDTH, op._FORWARD["block_d"])
    forward = AotCase(
        "frame_embed forward",
        op._forward_kernel,
        {
            "p_tokens": "*i32",
            "p_is_audio": "*i1",
            "p_text_table": table,
            "p_audio_table": table,
            "p_out": table,
            "n_text": "i32",
            "vocab": "i32",
        },
        {"K": CODEBOOKS, "D": WIDTH, "IDS": CODEBOOKS, "BLOCK_D": block_d, "ROUND": op._FORWARD["round"]},
        num_warps=num_warps,
        num_stages=1,
    )
    backward = []
    block_d, _, num_warps = op._columns(WIDTH, op._BACKWARD["block_d"])
    # With the depth decoder's codes there are two gradients; a sparse gradient looks up where a row lies.
    for name, two, compact in [("audio", True, False), ("text", False, False), ("sparse audio", True, True)]:
        runs = {"p_keys": "*i32", "p_place": "*i32", "p_partial": "*fp32", "p_out": table, "M": "i32", "n_rows": "i32"}
        meta = {"D": WIDTH, "CHUNK": op._CHUNK, "BLOCK_D": block_d, "COMPACT": compact}
        backward.append(
            AotCase(
                f"frame_embed backward, sum, {name}",
                op._sum_kernel,
                runs | {"p_grad": table, "p_more": table, "p_source": "*i32", "p_starts": "*i32", "n_first": "i32"},
                meta | {"TWO": two, "ROUND": op._BACKWARD["round"]},
                num_warps=num_warps,
                num_stages=1,
            )
        )
        if name != "text":
            join = AotCase(f"frame_embed backward, join, {name}", op._join_kernel, runs, meta, num_warps, num_stages=1)
            backward.append(join)
    return [forward, *backward]

"""A layer of a stack in bytes: what it keeps for its backward pass, and what it takes while it runs.

This is the part of the walk in ``step`` that repeats from layer to layer. It follows ``csm_fast.model.stacks`` and the
operators that it calls. A layer is computed in one of four forms:

* On a CPU as one autograd node (``csm_fast.model.layer_cpu``).
* On a CPU operator by operator, with what PyTorch's autograd keeps: with DoRA, or with dropout before an adapter.
  ``benchmarks/memory_plan.py`` measures these two.
* On CUDA without ``torch.compile`` operator by operator, with other operators. This form follows from the code.
* Under ``torch.compile``, which keeps what its partitioner chooses. ``tests/planner/test_memory.py`` checks the choice
  on a CPU; the rest follows from the code.

Nothing here was measured on a GPU.

Sizes in comments: n rows of a stack of width D, with F the width of its MLP, KV that of its keys, H heads; c bytes of
the type of the matrix products, r bytes of the residual stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from csm_kernels.constants import FOLDED_SCORES, GROUP_SCORES, QUERY_ROWS

from csm_fast.config.targets import LAYER_LINEARS
from csm_fast.planner.ledger import ACTIVATIONS, COPIES, GRADIENTS, WORKSPACE, Ledger
from csm_fast.planner.stack import Setup, Stack
from csm_fast.planner.tensors import Weight

GROUP_PADDING = 1.1  # packed_attention pads segments of similar length to the longest: up to 25 %, about 10 %
# The linear layers whose copies a layer keeps for its backward pass, per activation checkpointing.
KEPT_COPIES = {"off": LAYER_LINEARS, "selective": LAYER_LINEARS[:4], "full": ()}


class Layers:
    """What a layer of either stack allocates and frees, forward and backward.

    Args:
        accumulated: the gradients of earlier packs exist.
    """

    def __init__(self, setup: Setup, accumulated: bool):
        self.setup, self.c, self.accumulated = setup, setup.compute, accumulated
        self.ledger = Ledger()
        self.cached: Counter = Counter()  # bytes of copies by layer, held until its backward or the end of the forward

    # ------------------------------------------------------------------------------------------------- small parts

    def gradient(self, weight: Weight, cast: bool = True) -> None:
        """Compute the gradients of a linear layer's tensors. Under autocast the gradient of a float32 weight is
        computed in the compute type first, and for a moment both exist."""
        ledger, narrow = self.ledger, self.setup.autocast and cast
        for elements, width in weight.trained_tensors():
            first = ledger.hold(WORKSPACE, elements * self.c) if narrow and width > self.c else 0
            if self.accumulated:
                ledger.touch(elements * width)  # then added to the gradient of earlier packs
            elif self.setup.in_backward:
                ledger.hold(GRADIENTS, elements * width)
                ledger.drop(GRADIENTS, elements * width)
            else:
                ledger.hold(GRADIENTS, elements * width)
            ledger.drop(WORKSPACE, first)

    def is_cast(self, weight: Weight) -> bool:
        """Whether autocast makes a copy of the weight."""
        return self.setup.autocast and not weight.quantised and weight.width > self.c

    def copy(self, weight: Weight) -> int:
        """Bytes of the copies that a linear layer multiplies with. NF4 is unpacked for each product and then freed."""
        size = weight.numel * self.c if self.is_cast(weight) else 0
        if weight.rank and self.setup.autocast and self.c < 4:
            size += weight.rank * (weight.inputs + weight.outputs) * self.c
        return size

    def unpacked(self, weight: Weight) -> int:
        return weight.numel * self.c if weight.quantised else 0

    def saved_input(self, weight: Weight, rows: int, wide: bool) -> int:
        """Bytes that a linear layer saves of its input, and does not share with other layers: a copy of its own if the
        input is ``wide`` (float32 under autocast). PEFT converts an adapter's input to float32 first, so under autocast
        an adapter always has a copy."""
        size = 0
        if weight.trained and wide:
            size += rows * weight.inputs * self.c
        if weight.rank:
            own = self.setup.autocast or self.setup.dropout
            size += rows * weight.inputs * self.c * own + rows * weight.rank * self.c
            size += rows * weight.inputs * 4 * self.setup.dropout  # the mask of dropout
            # DoRA multiplies the layer's own product and the adapter's by trained factors, and saves both.
            size += 2 * rows * weight.outputs * self.c * weight.dora
        return size

    def dora_scratch(self, weight: Weight, rows: int) -> int:
        """Bytes while DoRA computes in float32: both products and their sum, or W + s B A and its parts."""
        if not weight.dora or self.setup.compiled:
            return 0
        return 4 * max(3 * rows * weight.outputs, 3 * weight.numel)

    # --------------------------------------------------------------------------------------------------- one layer

    def saved(self, stack: Stack, index: int) -> tuple[int, int, int]:
        """Bytes that a layer saves for its backward pass, without its input: the attention's part, the MLP's part, and
        how much of the latter w2 saves of its input."""
        form = self._saved_compiled if self.setup.compiled else self._saved_fused if self.fused(stack) else self._saved
        return form(stack.layers[index], stack, stack.after(index))

    def fused(self, stack: Stack) -> bool:
        """Whether ``csm_fast.model.layer_cpu`` computes the layer."""
        drops = self.setup.dropout and any(w.rank for layer in stack.layers for w in layer.values())
        plain = not drops and not any(w.dora for layer in stack.layers for w in layer.values())
        return self.setup.device == "cpu" and not self.setup.compiled and plain

    def _saved_fused(self, _: dict[str, Weight], stack: Stack, m: int) -> tuple[int, int, int]:
        """Folded q, k and v, the attention's output, w1's and w3's results, and the factors of the norms."""
        n, c, config, width = stack.rows, self.c, stack.config, stack.config.embed_dim
        folded = n * (width + 2 * config.num_kv_heads * config.head_dim) * c
        first = int(folded * (GROUP_PADDING if stack.packed else 1)) + m * width * c + 4 * n
        return first, m * (width * stack.residual + 4) + 2 * m * config.intermediate_dim * c, 0

    def _saved_compiled(self, layer: dict[str, Weight], stack: Stack, m: int) -> tuple[int, int, int]:
        """The partitioner keeps the results of matrix products, and the operands that their backward passes need. It
        recomputes the cheap operations between them. (Seen with the backend aot_eager_decomp_partition on a CPU.)"""
        n, c, config, width = stack.rows, self.c, stack.config, stack.config.embed_dim
        kv, hidden = config.num_kv_heads * config.head_dim, config.intermediate_dim

        def of(*names: str, n: int = m) -> tuple[bool, int]:
            """Whether one of them needs its input, and the results of the adapters' A, DoRA's products too."""
            used = [layer[name] for name in names]
            needs = any(w.trained or w.rank for w in used)
            return needs, sum(n * (w.rank + w.outputs * w.dora) * c for w in used)

        needs, ranks = of("q_proj", "k_proj", "v_proj", n=n)
        first = n * width * c * needs + ranks
        first += n * (2 * width + 2 * kv) * c  # q, k, v, output
        first += 4 * n * (2 + config.num_heads * stack.packed)  # lse, 1/rms
        first += m * width * c + of("output_proj")[1]  # output_proj's result, from which the MLP's input is recomputed
        out = layer["output_proj"]
        # PEFT's copy of its input, the residual stream that Inductor keeps on CUDA, or a copy of the chosen rows.
        first += m * width * c * (out.dora or (out.rank > 0 and self.setup.device == "cuda") or m < n)
        needs, ranks = of("w2")
        product = m * hidden * c * needs + ranks
        needs, ranks = of("w1", "w3")
        return first, m * width * c * needs + ranks + 2 * m * hidden * c + product, product

    def _saved(self, layer: dict[str, Weight], stack: Stack, m: int) -> tuple[int, int, int]:
        n, c, config, width = stack.rows, self.c, stack.config, stack.config.embed_dim
        kv, hidden = config.num_kv_heads * config.head_dim, config.intermediate_dim
        # The norm's result is float32 if its scale or the residual stream is. Then every product copies it.
        wide = self.setup.autocast and max(layer["sa_norm"].width, stack.residual) > c

        def of(*names: str, n: int = m) -> int:
            used = [layer[name] for name in names]
            shared = not wide and any(w.trained or (w.rank and not self.setup.autocast) for w in used)
            return sum(self.saved_input(w, n, wide) for w in used) + n * width * c * shared

        first = of("q_proj", "k_proj", "v_proj", n=n) + 4 * n
        # q, k, v (rotated on a CPU, before the rotation for the decoder's kernel), the output; lse of packed attention.
        first += n * (width + 2 * kv) * c
        out = layer["output_proj"]
        needs_out = out.trained or (out.rank and not self.setup.autocast)
        first += n * width * c * (stack.packed or bool(needs_out)) + 4 * n * config.num_heads * stack.packed
        first += m * width * c * (m < n and bool(needs_out))
        first += self.saved_input(out, m, False)
        if self.setup.device == "cpu" and stack.packed:
            first += 2 * n * config.head_dim * 4  # cos + i sin of each row, for q and for k
        second = m * width * stack.residual + 4 * m  # the MLP's input
        second += of("w1", "w3")
        second += 3 * m * hidden * c  # w1's result, its silu, w3's
        w2 = layer["w2"]
        needs_product = w2.trained or (w2.rank and not self.setup.autocast)
        product = m * hidden * c * bool(needs_product) + self.saved_input(w2, m, False)
        # On CUDA, PyTorch's operators compute the norms. They save the results before the scale, and narrower inputs
        # in float32.
        norms = (width * stack.residual + width * 4 * (stack.residual < 4)) * (self.setup.device == "cuda")
        return first + n * norms, second + m * norms + product, product

    def layer_copies(self, stack: Stack, index: int, names: Iterable[str]) -> int:
        return sum(self.copy(stack.layers[index][name]) for name in names)

    def forward_layer(self, stack: Stack, index: int) -> None:
        ledger, setup, config = self.ledger, self.setup, stack.config
        n, width, hidden, c = stack.rows, config.embed_dim, config.intermediate_dim, self.c
        kv, m, fused = config.num_kv_heads * config.head_dim, stack.after(index), self.fused(stack)
        first, second, _ = self.saved(stack, index)
        if not stack.active:
            ledger.touch(max(map(self.copy, stack.layers[index].values())))
        else:
            # Compiled, a copy is freed after its product unless the backward pass needs it; else autocast keeps all.
            names = KEPT_COPIES[setup.checkpointing] if setup.compiled else LAYER_LINEARS
            if fused and setup.checkpointing == "full":  # made without autocast's cache, which keeps copies to the end
                ledger.touch(self.layer_copies(stack, index, names))
                names = ()
            self.cached[stack.name, index] = ledger.hold(COPIES, self.layer_copies(stack, index, names))
        unpacked = max(map(self.unpacked, stack.layers[index].values()))
        normed = n * width * 4
        attention = (3 * n * (width + kv) * 4 + self.attention_scratch(stack, False)) * (not setup.compiled)
        if not stack.active:
            if fused:  # one node frees its results when it ends
                results = first + second + m * (hidden + width) * c + m * width * stack.residual
                ledger.touch(max(attention, results) + self.layer_copies(stack, index, LAYER_LINEARS))
                return
            ledger.touch(max(3 * m * hidden * c, attention) + normed + n * width * stack.residual + unpacked)
            return
        # The layer saves in any case while it runs; then checkpointing frees what it saved.
        held = ledger.hold(ACTIVATIONS, first)
        scaled = max(self.dora_scratch(w, n) for w in stack.layers[index].values())
        ledger.touch(max(attention, normed + unpacked))
        held_mlp = ledger.hold(ACTIVATIONS, second)
        if fused:  # silu and the normed rows
            ledger.touch(m * hidden * c + m * width * c + unpacked)
        # DoRA scales w3's product before its result and w2's input exist.
        ledger.touch(max(m * width * stack.residual + unpacked + m * hidden * c, scaled - 2 * m * hidden * c))
        if setup.checkpointing == "full":
            ledger.drop(ACTIVATIONS, held + held_mlp)
        elif setup.checkpointing == "selective":
            # The MLP's input is kept; compiled, it is recomputed from the layer's input and output_proj's result.
            keeps = 0 if setup.compiled else m * width * stack.residual
            ledger.drop(ACTIVATIONS, held_mlp - keeps)

    def attention_scratch(self, stack: Stack, backward: bool) -> int:
        """Bytes that the attention takes while it runs. They depend on the segments, so this is an approximation."""
        n, config, c = stack.rows, stack.config, self.c
        width, kv = config.embed_dim, config.num_kv_heads * config.head_dim
        if self.setup.device == "cuda":
            if not stack.packed:
                return n * (width + 2 * kv) * c if backward else 0
            if not self.setup.varlen:
                # The formula in float32: three matrices with the scores of some heads, at least those of one key-value
                # head in a segment as long as the context; and the rows of the groups with their results.
                longest = min(n, config.max_seq_len)
                of_one = longest * longest * config.num_heads // config.num_kv_heads
                scores = min(max(GROUP_SCORES, of_one), n * longest * config.num_heads)
                rows = int(GROUP_PADDING * n) * ((4 * width + 2 * kv) * c if backward else (2 * width + 2 * kv) * c)
                return 12 * scores + rows
            # flash-attn: dq in float32, and dk and dv of every query head before they are added.
            return n * width * (4 + 3 * c) + 2 * n * kv * c if backward else 0
        # Segments of similar length are one group, perhaps half of a pack's rows.
        scores = min(FOLDED_SCORES, n * config.num_heads * (QUERY_ROWS[0] // 2 if stack.packed else stack.length))
        # Bytes of a score: p, dp and ds, or in bf16 the softmax in float32.
        scores *= 12 if backward or c < 4 else 8
        if not stack.packed:
            return scores + (n * (width + 2 * kv) * c if backward else 0)
        if backward and self.fused(stack):  # grad gathered; dq, dk, dv
            return int(GROUP_PADDING * n * (2 * width + 2 * kv) * c) + scores
        if backward:  # grad, q, k, v, out gathered; dq, dk, dv, and joined
            return int(GROUP_PADDING * n * (3 * width + 2 * kv) * c) + n * (width + 2 * kv) * c * 2 + scores
        return int(GROUP_PADDING * n * (2 * width + 2 * kv) * c) + scores

    def backward_layer(self, stack: Stack, index: int) -> None:
        ledger, setup, config = self.ledger, self.setup, stack.config
        layer, n, c, r = stack.layers[index], stack.rows, self.c, stack.residual
        width, hidden, kv = config.embed_dim, config.intermediate_dim, config.num_kv_heads * config.head_dim
        m = stack.after(index)
        if not stack.active:
            return
        first, second, product_saved = self.saved(stack, index)
        keeps = 0 if setup.compiled else m * width * r
        if setup.checkpointing == "full":
            self.cached[stack.name, index] = ledger.hold(COPIES, self.layer_copies(stack, index, LAYER_LINEARS))
            ledger.hold(ACTIVATIONS, first + second)
        elif setup.checkpointing == "selective":
            again = set(LAYER_LINEARS) - set(KEPT_COPIES["selective"])
            self.cached[stack.name, index] += ledger.hold(COPIES, self.layer_copies(stack, index, again))
            ledger.hold(ACTIVATIONS, second - keeps)

        if self.fused(stack):
            self._backward_fused(stack, index)
            gone = 2 * m * hidden * c * (setup.checkpointing == "selective")  # before the attention
            ledger.drop(ACTIVATIONS, first + second - gone)
            return

        def through(name: str) -> None:
            """A linear layer's backward pass: computes its gradients, then frees its copy."""
            weight = layer[name]
            unpacked = ledger.hold(WORKSPACE, self.unpacked(weight))
            if weight.rank and setup.autocast and not setup.compiled:
                # The backward passes of PEFT's cast to float32 and autocast's cast to the compute type.
                ledger.touch(n * weight.inputs * (4 + c))
            ledger.touch(self.dora_scratch(weight, n))
            self.gradient(weight)
            ledger.drop(WORKSPACE, unpacked)
            size = ledger.drop(COPIES, min(self.copy(weight), self.cached[stack.name, index]))
            self.cached[stack.name, index] -= size

        # The MLP: the gradient of the product silu(w1 x) * w3 x, then those of both its factors.
        product = ledger.hold(WORKSPACE, m * hidden * c + m * width * c * (r > c))
        through("w2")
        ledger.drop(ACTIVATIONS, product_saved)
        factors = ledger.hold(WORKSPACE, 2 * m * hidden * c)
        ledger.drop(WORKSPACE, product)
        ledger.drop(ACTIVATIONS, 2 * m * hidden * c)
        into = ledger.hold(WORKSPACE, m * width * 4)
        through("w3")
        through("w1")
        ledger.drop(WORKSPACE, factors)
        ledger.drop(ACTIVATIONS, second - product_saved - 2 * m * hidden * c)
        self.gradient(layer["mlp_norm"], cast=False)
        ledger.touch(3 * m * width * 4)
        ledger.drop(WORKSPACE, into)
        # The attention. The backward pass of the rotation is in float32.
        out = ledger.hold(WORKSPACE, n * width * c)
        through("output_proj")
        ledger.touch(self.attention_scratch(stack, True))
        ledger.touch(2 * n * (width + kv) * 4 * (not setup.compiled))
        ledger.drop(WORKSPACE, out)
        into = ledger.hold(WORKSPACE, n * (width + 2 * kv) * c + n * width * 4)
        for name in ("v_proj", "k_proj", "q_proj"):
            through(name)
        ledger.drop(ACTIVATIONS, first)
        ledger.drop(WORKSPACE, into)
        self.gradient(layer["sa_norm"], cast=False)
        ledger.touch(4 * n * width * 4)
        ledger.drop(COPIES, self.cached.pop((stack.name, index), 0))

    def _formed(self, weight: Weight) -> int:
        """Bytes of a linear layer's gradients as the node computes them."""
        size = weight.numel * self.c if weight.trained else 0
        return size + weight.rank * (weight.inputs + weight.outputs) * self.c

    def _backward_fused(self, stack: Stack, index: int) -> None:
        """The backward pass of one node. Until it ends it keeps what was saved, and the gradients of its weights in the
        compute type; then each gradient is added to its weight's."""
        ledger, config, layer, c = self.ledger, stack.config, stack.layers[index], self.c
        n, m, width, kv = stack.rows, stack.after(index), config.embed_dim, config.num_kv_heads * config.head_dim
        inner = m * config.intermediate_dim * c
        unpacked = max(map(self.unpacked, layer.values()))
        rows = ledger.hold(WORKSPACE, m * width * (4 + c) + m * width * c * (stack.residual > c))

        def form(*names: str) -> int:
            return ledger.hold(WORKSPACE, sum(self._formed(layer[name]) for name in names))

        formed = ledger.hold(WORKSPACE, 2 * inner)  # silu, and its product with w3's result for w2's gradient
        grads = form("w2")
        ledger.touch(2 * inner + unpacked)  # the product's gradient, and those of both factors
        grads += form("w1", "w3")
        ledger.drop(WORKSPACE, formed)
        ledger.drop(ACTIVATIONS, 2 * inner * (self.setup.checkpointing == "selective"))
        ledger.touch(3 * m * width * 4)
        ledger.drop(WORKSPACE, rows)
        rows = ledger.hold(WORKSPACE, n * width * (c + 4))
        grads += form("output_proj")
        ledger.touch(self.attention_scratch(stack, True) + n * (width + 2 * kv) * c)
        grads += form("q_proj", "k_proj", "v_proj")
        ledger.touch(4 * n * width * 4 + unpacked)
        ledger.drop(WORKSPACE, rows)
        for name in ("sa_norm", "q_proj", "k_proj", "v_proj", "output_proj", "mlp_norm", "w1", "w2", "w3"):
            weight = layer[name]
            held = self._formed(weight) if "norm" not in name else 0
            wide = weight.width > c if weight.trained else c < 4
            if not wide:
                grads -= ledger.drop(WORKSPACE, held)  # it becomes the weight's own
            self.gradient(weight, cast=False)
            if held and wide:
                grads -= ledger.drop(WORKSPACE, held)
        assert not grads
        ledger.drop(COPIES, self.cached.pop((stack.name, index), 0))

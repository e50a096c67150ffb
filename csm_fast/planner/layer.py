"""A layer of a stack in bytes: what it saves for its backward pass, and what it takes while it runs.

The part of ``memory_step.py``'s walk that repeats from layer to layer. It follows ``model.run_layer``
and the operators that this calls.

Four forms are walked. On a CPU layers are one node each (``layer_cpu.py``); those with DoRA, or with dropout before an
adapter, run operation by operation, as PyTorch's autograd saves them; both are measured
(``benchmarks/memory_plan.py``). On CUDA without
``torch.compile`` they do the same with other operators; this follows from the code. Compiled, a layer keeps what the
compiler's partitioner chooses; what it chooses was looked at on a CPU (``tests/test_memory.py``), the rest follows
from the code. Nothing here was measured on a GPU.

Sizes in the comments: n rows of a stack of width D, with F the width of its MLP, KV that of its keys, H heads; c bytes
of the type of the matrix products, r bytes of the residual stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from csm_kernels.constants import FOLDED_SCORES, GROUP_SCORES, QUERY_ROWS

from csm_fast.config.shape import TransformerConfig
from csm_fast.config.targets import LAYER_LINEARS
from csm_fast.planner.ledger import ACTIVATIONS, COPIES, GRADIENTS, WORKSPACE, Ledger
from csm_fast.planner.tensors import Weight

GROUP_PADDING = 1.1  # packed_attention pads segments of similar length to one: up to a quarter, about a tenth
# The linear layers whose copies a layer keeps for its backward pass, per activation checkpointing.
KEPT_COPIES = {"off": LAYER_LINEARS, "selective": LAYER_LINEARS[:4], "full": ()}


@dataclass(frozen=True)
class Setup:
    """How a step is computed.

    Attributes:
        device: "cpu" or "cuda".
        compiled: the layers run under ``torch.compile``.
        autocast: products are cast from float32; ``compute`` is the bytes of their type.
        checkpointing: "off", "selective" or "full".
        dropout: the adapters have one.
        in_backward: each weight is updated as soon as its gradient is there.
        packs: per optimizer step; from the second on, gradients are there from the start.
        varlen: on CUDA a variable-length kernel serves the packed attention: from sm_80 on, in bf16 and fp16.
    """

    device: str
    compiled: bool
    autocast: bool
    compute: int
    checkpointing: str
    dropout: bool = False
    in_backward: bool = False
    packs: int = 1
    varlen: bool = True


@dataclass(frozen=True)
class Stack:
    """A Llama stack at work."""

    name: str
    config: TransformerConfig
    rows: int  # n
    residual: int  # r
    layers: list[dict[str, Weight]]
    norm: Weight
    packed: bool
    length: int  # of the sequences that are not packed: the depth decoder's
    reached: bool  # something before it is trained, so gradients go through it
    wanted: int  # rows whose states are used; the last layer's output projection and MLP run on them alone

    def after(self, index: int) -> int:
        """Rows behind the attention of a layer."""
        return self.wanted if index == len(self.layers) - 1 else self.rows

    @property
    def active(self) -> bool:
        return self.reached or any(w.trained or w.rank for layer in self.layers for w in layer.values())


class Layers:
    """What a layer of either stack takes and gives back, forward and backward."""

    def __init__(self, setup: Setup, accumulated: bool):
        """``accumulated``: gradients are there from earlier packs."""
        self.setup, self.c, self.accumulated = setup, setup.compute, accumulated
        self.ledger = Ledger()
        self.cached: Counter = Counter()  # copies by layer, held until the layer's backward or the end of the forward

    # ------------------------------------------------------------------------------------------------- small parts

    def gradient(self, weight: Weight, cast: bool = True) -> None:
        """The gradients of a linear layer's tensors are formed. Under autocast a float32 weight's is formed in the
        compute type first, and both are there for a moment."""
        ledger, narrow = self.ledger, self.setup.autocast and cast
        for elements, width in weight.trained_tensors():
            first = ledger.hold(WORKSPACE, elements * self.c) if narrow and width > self.c else 0
            if self.accumulated:
                ledger.touch(elements * width)  # then added to what earlier packs gave
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
        """Bytes of the copies that a linear layer multiplies with. NF4 is unpacked for each product and let go."""
        size = weight.numel * self.c if self.is_cast(weight) else 0
        if weight.rank and self.setup.autocast and self.c < 4:
            size += weight.rank * (weight.inputs + weight.outputs) * self.c
        return size

    def unpacked(self, weight: Weight) -> int:
        return weight.numel * self.c if weight.quantised else 0

    def saved_input(self, weight: Weight, rows: int, wide: bool) -> int:
        """Bytes that a linear layer saves of its input, beside what is shared with others: its own copy where the
        input is ``wide`` (float32 under autocast). PEFT widens an adapter's input first, so that is always a copy."""
        size = 0
        if weight.trained and wide:
            size += rows * weight.inputs * self.c
        if weight.rank:
            own = self.setup.autocast or self.setup.dropout
            size += rows * weight.inputs * self.c * own + rows * weight.rank * self.c
            size += rows * weight.inputs * 4 * self.setup.dropout  # its mask
            # DoRA scales the layer's own product and the adapter's, each by a trained factor.
            size += 2 * rows * weight.outputs * self.c * weight.dora
        return size

    def dora_scratch(self, weight: Weight, rows: int) -> int:
        """Bytes while DoRA scales in float32: both products and their sum, or W + s B A and its parts for the norm."""
        if not weight.dora or self.setup.compiled:
            return 0
        return 4 * max(3 * rows * weight.outputs, 3 * weight.numel)

    # --------------------------------------------------------------------------------------------------- one layer

    def saved(self, stack: Stack, index: int) -> tuple[int, int, int]:
        """Bytes that a layer saves for its backward pass beside its input: the attention's part, the MLP's, and of
        that what w2 saves of its input."""
        form = self._saved_compiled if self.setup.compiled else self._saved_fused if self.fused(stack) else self._saved
        return form(stack.layers[index], stack, stack.after(index))

    def fused(self, stack: Stack) -> bool:
        """Whether ``layer_cpu.py`` serves."""
        drops = self.setup.dropout and any(w.rank for layer in stack.layers for w in layer.values())
        plain = not drops and not any(w.dora for layer in stack.layers for w in layer.values())
        return self.setup.device == "cpu" and not self.setup.compiled and plain

    def _saved_fused(self, _: dict[str, Weight], stack: Stack, m: int) -> tuple[int, int, int]:
        """Folded q, k and v, the attention's output, and w1's and w3's results; of the norms the factors."""
        n, c, config, width = stack.rows, self.c, stack.config, stack.config.embed_dim
        folded = n * (width + 2 * config.num_kv_heads * config.head_dim) * c
        first = int(folded * (GROUP_PADDING if stack.packed else 1)) + m * width * c + 4 * n
        return first, m * (width * stack.residual + 4) + 2 * m * config.intermediate_dim * c, 0

    def _saved_compiled(self, layer: dict[str, Weight], stack: Stack, m: int) -> tuple[int, int, int]:
        """The partitioner keeps results of matrix products, and what such a product needs in the backward pass; cheap
        things between them are computed again. (Seen with the backend aot_eager_decomp_partition on a CPU.)"""
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
        first += m * width * c + of("output_proj")[1]  # output_proj's result, from which the MLP's input comes again
        out = layer["output_proj"]
        # PEFT's copy of its input, the residual stream that Inductor keeps on CUDA, or the rows' own.
        first += m * width * c * (out.dora or (out.rank > 0 and self.setup.device == "cuda") or m < n)
        needs, ranks = of("w2")
        product = m * hidden * c * needs + ranks
        needs, ranks = of("w1", "w3")
        return first, m * width * c * needs + ranks + 2 * m * hidden * c + product, product

    def _saved(self, layer: dict[str, Weight], stack: Stack, m: int) -> tuple[int, int, int]:
        n, c, config, width = stack.rows, self.c, stack.config, stack.config.embed_dim
        kv, hidden = config.num_kv_heads * config.head_dim, config.intermediate_dim
        # Norm: float32 where its scale or the residual stream is; then every product makes a copy of its own.
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
        # On CUDA the norms run as they are written and save their results before the scale, and their inputs in float32
        # where those are narrower.
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
            # Compiled, each goes after its product unless the backward pass needs it; else autocast keeps them all.
            names = KEPT_COPIES[setup.checkpointing] if setup.compiled else LAYER_LINEARS
            if fused and setup.checkpointing == "full":  # made without autocast's cache, which keeps to the end
                ledger.touch(self.layer_copies(stack, index, names))
                names = ()
            self.cached[stack.name, index] = ledger.hold(COPIES, self.layer_copies(stack, index, names))
        unpacked = max(map(self.unpacked, stack.layers[index].values()))
        normed = n * width * 4
        attention = (3 * n * (width + kv) * 4 + self.attention_scratch(stack, False)) * (not setup.compiled)
        if not stack.active:
            if fused:  # a node's results are there until it ends
                results = first + second + m * (hidden + width) * c + m * width * stack.residual
                ledger.touch(max(attention, results) + self.layer_copies(stack, index, LAYER_LINEARS))
                return
            ledger.touch(max(3 * m * hidden * c, attention) + normed + n * width * stack.residual + unpacked)
            return
        # What is saved is there in any case while the layer runs; then checkpointing lets go of it.
        held = ledger.hold(ACTIVATIONS, first)
        scaled = max(self.dora_scratch(w, n) for w in stack.layers[index].values())
        ledger.touch(max(attention, normed + unpacked))
        held_mlp = ledger.hold(ACTIVATIONS, second)
        if fused:  # silu and the normed rows
            ledger.touch(m * hidden * c + m * width * c + unpacked)
        # DoRA scales w3's product while its result and w2's input are not there yet.
        ledger.touch(max(m * width * stack.residual + unpacked + m * hidden * c, scaled - 2 * m * hidden * c))
        if setup.checkpointing == "full":
            ledger.drop(ACTIVATIONS, held + held_mlp)
        elif setup.checkpointing == "selective":
            # The MLP's input stays; compiled, it is computed again from the layer's and output_proj's result.
            keeps = 0 if setup.compiled else m * width * stack.residual
            ledger.drop(ACTIVATIONS, held_mlp - keeps)

    def attention_scratch(self, stack: Stack, backward: bool) -> int:
        """Bytes that the attention takes while it runs, roughly: they depend on the segments."""
        n, config, c = stack.rows, stack.config, self.c
        width, kv = config.embed_dim, config.num_kv_heads * config.head_dim
        if self.setup.device == "cuda":
            if not stack.packed:
                return n * (width + 2 * kv) * c if backward else 0
            if not self.setup.varlen:
                # By formula, in float32: some of a key-value head's scores in each of three matrices, forward, and of a
                # segment as long as the context; the groups' rows and what comes of them.
                longest = min(n, config.max_seq_len)
                of_one = longest * longest * config.num_heads // config.num_kv_heads
                scores = min(max(GROUP_SCORES, of_one), n * longest * config.num_heads)
                rows = int(GROUP_PADDING * n) * ((4 * width + 2 * kv) * c if backward else (2 * width + 2 * kv) * c)
                return 12 * scores + rows
            # flash-attn's: dq in float32, and dk and dv for every query head before they are added up.
            return n * width * (4 + 3 * c) + 2 * n * kv * c if backward else 0
        # Segments of a length come together, perhaps half of a pack's rows.
        scores = min(FOLDED_SCORES, n * config.num_heads * (QUERY_ROWS[0] // 2 if stack.packed else stack.length))
        # Bytes of one: p, dp and ds, or in bf16 the softmax in float32.
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
            """A linear layer's backward: its gradients, then its copy goes."""
            weight = layer[name]
            unpacked = ledger.hold(WORKSPACE, self.unpacked(weight))
            if weight.rank and setup.autocast and not setup.compiled:
                # The way back through PEFT's cast to float32 and autocast's to the compute type.
                ledger.touch(n * weight.inputs * (4 + c))
            ledger.touch(self.dora_scratch(weight, n))
            self.gradient(weight)
            ledger.drop(WORKSPACE, unpacked)
            size = ledger.drop(COPIES, min(self.copy(weight), self.cached[stack.name, index]))
            self.cached[stack.name, index] -= size

        # The MLP. Beside what is saved: the gradient of the product, then those of both its factors.
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
        # The attention. The rotation's way back is in float32.
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
        """Bytes of a linear layer's gradients as the node forms them."""
        size = weight.numel * self.c if weight.trained else 0
        return size + weight.rank * (weight.inputs + weight.outputs) * self.c

    def _backward_fused(self, stack: Stack, index: int) -> None:
        """The one node: what is saved stays until its end, and with it the gradients of its weights, in the compute
        type; then each goes to its weight."""
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
                grads -= ledger.drop(WORKSPACE, held)  # it becomes the weight's
            self.gradient(weight, cast=False)
            if held and wide:
                grads -= ledger.drop(WORKSPACE, held)
        assert not grads
        ledger.drop(COPIES, self.cached.pop((stack.name, index), 0))

"""One training step in bytes: what is allocated at each moment, and so the peak.

The peak is not the sum of all tensors: activations are freed while gradients are allocated. So the walk goes through a
step in its own order (forward, loss, backward, update), and a ledger records what each operation allocates and frees.
The walk follows ``csm_fast.model`` and the operators. ``benchmarks/memory_plan.py`` measures how close it comes.

``layer`` walks through the layers, and says how that was checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from csm_kernels.constants import HEAD_COLUMNS, LOGITS_BUDGET, SOFTMAX_BUDGET

from csm_fast.config.shape import CSMConfig, TransformerConfig
from csm_fast.planner.layer import KEPT_COPIES, Layers
from csm_fast.planner.ledger import ACTIVATIONS, ADAPTERS, COPIES, GRADIENTS, OPTIMIZER, WEIGHTS, WORKSPACE, Ledger
from csm_fast.planner.stack import Setup, Stack
from csm_fast.planner.tensors import Weight

TABLE_KEYS = 40  # bytes per look-up while the gradient of a table is sorted: keys, their order, and the sort's scratch


@dataclass(frozen=True)
class Load:
    """Sizes of a pack: its rows, the supervised frames among them, and the frames that the depth decoder sees."""

    rows: int
    targets: int
    frames: int


class Walk(Layers):
    """A walk through one optimizer step. ``ledger`` holds the result.

    Args:
        every: all parameters of the model.
        state: bytes of the optimizer's state.
    """

    def __init__(self, shape: CSMConfig, every: list[Weight], setup: Setup, load: Load, state: int):
        super().__init__(setup, setup.packs > 1)
        self.shape, self.load = shape, load
        self.weights = {w.name: w for w in every}
        ledger = self.ledger
        ledger.hold(WEIGHTS, sum(w.stored for w in every))
        ledger.hold(ADAPTERS, 4 * sum(w.adapter for w in every))
        ledger.hold(OPTIMIZER, state)
        self.text, self.audio = self.weights["text_embeddings"], self.weights["audio_embeddings"]
        if self.accumulated:
            ledger.hold(GRADIENTS, sum(n * b for w in every for n, b in w.trained_tensors()))

    # ---------------------------------------------------------------------------------------------- a stack, a head

    def stack(
        self, name: str, config: TransformerConfig, rows: int, residual: int, reached: bool, wanted: int
    ) -> Stack:
        linears = {"attn": ("q_proj", "k_proj", "v_proj", "output_proj"), "mlp": ("w1", "w2", "w3")}
        layers = []
        for i in range(config.num_layers):
            layer = {n: self.weights[f"{name}.layers.{i}.{at}.{n}"] for at, names in linears.items() for n in names}
            layer |= {n: self.weights[f"{name}.layers.{i}.{n}"] for n in ("sa_norm", "mlp_norm")}
            layers.append(layer)
        norm, length = self.weights[name + ".norm"], self.shape.num_codebooks
        return Stack(name, config, rows, residual, layers, norm, name == "backbone", length, reached, wanted)

    def forward_stack(self, stack: Stack) -> None:
        ledger, n, width = self.ledger, stack.rows, stack.config.embed_dim
        ledger.phase = f"forward: {stack.name}"
        if stack.packed:  # cosines and sines of each row
            ledger.hold(ACTIVATIONS if self._keeps_angles(stack) else WORKSPACE, n * stack.config.head_dim * 4)
        for index in range(len(stack.layers)):
            self.forward_layer(stack, index)
            if stack.active:  # its result, the next one's input
                ledger.hold(ACTIVATIONS, stack.after(index) * width * stack.residual)
        if stack.packed and not self._keeps_angles(stack):
            ledger.drop(WORKSPACE, n * stack.config.head_dim * 4)
        if self.setup.device == "cuda" and stack.active:  # the last norm's, before its scale
            ledger.hold(ACTIVATIONS, stack.wanted * width * stack.residual)
        ledger.touch(stack.wanted * width * 4 * 2)

    def _keeps_angles(self, stack: Stack) -> bool:
        keeps = self.setup.checkpointing == "full" or self.setup.compiled or self.fused(stack)
        return stack.active and keeps

    def backward_stack(self, stack: Stack) -> None:
        ledger, n, width = self.ledger, stack.rows, stack.config.embed_dim
        ledger.phase = f"backward: {stack.name}"
        if not stack.active:
            return
        stream = n * width * stack.residual
        arriving = ledger.hold(WORKSPACE, stream)
        ledger.touch(4 * stack.wanted * width * 4)
        self.gradient(stack.norm, cast=False)
        if self.setup.device == "cuda":
            ledger.drop(ACTIVATIONS, stack.wanted * width * stack.residual)
        for index in reversed(range(len(stack.layers))):
            ledger.drop(ACTIVATIONS, stack.after(index) * width * stack.residual)
            self.backward_layer(stack, index)
        if stack.packed and self._keeps_angles(stack):
            ledger.drop(ACTIVATIONS, n * stack.config.head_dim * 4)
        ledger.drop(WORKSPACE, arriving)

    def loss(self, head: Weight, rows: int, reached: bool) -> tuple[int, int]:
        """The forward pass of linear_cross_entropy, which computes the gradients as well.

        Returns:
            Bytes of the gradients of the hidden states and of the weight. They are held until the backward pass has
            scaled them.
        """
        ledger, c, heads = self.ledger, self.c, head.count
        ledger.phase = "loss"
        hidden = rows * heads * head.inputs * c
        trained = head.trained or head.rank > 0
        copy = ledger.hold(WORKSPACE, head.numel * c if head.width > c or head.rank else 0)
        states = ledger.hold(WORKSPACE, hidden if self.setup.autocast else 0)
        kept = (ledger.hold(ACTIVATIONS, hidden * reached), ledger.hold(ACTIVATIONS, head.numel * c * trained))
        vocab, padded = head.outputs, 0
        if self.setup.device == "cuda":
            columns = -(-vocab // HEAD_COLUMNS) * HEAD_COLUMNS
            padded = head.inputs * columns * c * (1 + trained)
            vocab = columns
        each = rows * vocab * c + padded
        chunk = max(1, min(heads, LOGITS_BUDGET // max(1, each)))
        logits = min(chunk * each, LOGITS_BUDGET)
        if each > LOGITS_BUDGET:  # one head at a time, beside the sum of its gradient
            logits = LOGITS_BUDGET
        pieces = 4 * min(SOFTMAX_BUDGET, 4 * chunk * rows * vocab) if self.setup.device == "cpu" else 0
        ledger.touch(logits + max(pieces, 2 * hidden * chunk // heads))
        ledger.drop(WORKSPACE, copy + states)
        return kept

    def loss_backward(self, head: Weight, kept: tuple[int, int]) -> None:
        """The head's gradient is converted to the weight's type."""
        self.ledger.phase = "backward: loss"
        if head.trained and head.width > self.c:
            elements = head.numel
            if self.accumulated:
                self.ledger.touch(elements * head.width)
            else:
                self.ledger.hold(GRADIENTS, elements * head.width)
            self.ledger.drop(ACTIVATIONS, kept[1])
        else:
            self.ledger.drop(ACTIVATIONS, kept[1])
            self.gradient(head, cast=False)
        if self.setup.in_backward and not self.accumulated and head.trained and head.width > self.c:
            self.ledger.drop(GRADIENTS, head.numel * head.width)

    # ------------------------------------------------------------------------------------------------ the whole step

    def run(self) -> Ledger:
        """Forward, loss, backward and update."""
        shape, load, ledger, c = self.shape, self.load, self.ledger, self.c
        backbone, decoder, codebooks = shape.backbone, shape.decoder, shape.num_codebooks
        rows, targets, frames = load.rows, load.targets, load.frames
        width, depth = backbone.embed_dim, decoder.embed_dim
        embedded_width = self.audio.width
        tables = self.text.learns or self.audio.learns
        ledger.phase = "forward: embeddings"
        # int32 tokens and positions, flags; targets and weights in float64.
        ledger.hold(WORKSPACE, rows * (4 * (codebooks + 2) + 1) + 8 * (2 * targets + 2 * frames))
        x = ledger.hold(ACTIVATIONS, rows * width * embedded_width)
        # With more look-ups than rows of the table, the decoder reads a projection of the whole table
        # (``projects_table`` in csm_fast.model.stacks).
        by_table = (codebooks - 1) * shape.audio_vocab_size if frames > shape.audio_vocab_size else 0
        looked_up = 0 if by_table else frames * (codebooks - 1)
        codes = ledger.hold(WORKSPACE, looked_up * width * embedded_width)
        ledger.touch(rows * width * embedded_width + rows * codebooks * 16)

        body = self.stack("backbone", backbone, rows, max(embedded_width, c), tables, targets)
        self.forward_stack(body)
        hidden = ledger.hold(WORKSPACE, targets * width * max(embedded_width, body.norm.width))
        head0, audio_head = self.weights["codebook0_head"], self.weights["audio_head"]
        kept0 = self.loss(head0, targets, body.active)

        ledger.phase = "forward: decoder"
        projection = self.weights["projection"]
        self.cached["projection", 0] = ledger.hold(COPIES, self.copy(projection))
        projects = projection.trained or projection.rank
        cast = self.setup.autocast and embedded_width > c
        saved = frames * width * c + (looked_up + by_table) * width * c * cast
        saved += looked_up * projection.rank * c
        saved = ledger.hold(ACTIVATIONS, saved * bool(projects))
        positions = frames * codebooks
        depth_residual = c
        below = bool(body.active or projects or self.audio.learns)
        ledger.hold(ACTIVATIONS, positions * depth * depth_residual)
        ledger.touch((positions + by_table) * depth * c)
        depths = self.stack("decoder", decoder, positions, depth_residual, below, positions)
        self.forward_stack(depths)
        states = ledger.hold(WORKSPACE, positions * depth * max(c, depths.norm.width))
        kept = self.loss(audio_head, frames, depths.active)
        # The end of the forward pass frees its local tensors, and those of autocast's copies that nothing saved.
        ledger.drop(WORKSPACE, codes + hidden + states)
        for stack in (body, depths):
            for index in range(len(stack.layers)):
                stays = self.layer_copies(stack, index, KEPT_COPIES[self.setup.checkpointing])
                stays = min(stays, self.cached[stack.name, index])
                ledger.drop(COPIES, self.cached[stack.name, index] - stays)
                self.cached[stack.name, index] = stays

        ledger.phase = "backward: loss"
        self.loss_backward(audio_head, kept)
        states = ledger.hold(WORKSPACE, positions * depth * max(c, depths.norm.width) * depths.active)
        ledger.drop(ACTIVATIONS, kept[0])
        ledger.drop(WORKSPACE, states)
        self.backward_stack(depths)
        ledger.phase = "backward: projection"
        ledger.drop(ACTIVATIONS, positions * depth * depth_residual)
        again = 0
        if by_table:
            grad = ledger.hold(WORKSPACE, by_table * (depth + width * self.audio.learns) * c)
            # The audio table has a second gradient, beside the frame embedding's, until both are added.
            again = ledger.hold(GRADIENTS, self.audio.numel * embedded_width * self.audio.learns)
            ledger.drop(WORKSPACE, grad)
        self.gradient(projection)
        ledger.drop(COPIES, self.cached.pop(("projection", 0)))
        ledger.drop(ACTIVATIONS, saved)
        codes = ledger.hold(WORKSPACE, looked_up * width * embedded_width * self.audio.learns)
        self.loss_backward(head0, kept0)
        ledger.drop(ACTIVATIONS, kept0[0])
        self.backward_stack(body)
        self.embeddings_backward(x, codes)
        ledger.drop(GRADIENTS, again)
        self.update()
        return ledger

    def embeddings_backward(self, x: int, codes: int) -> None:
        """The gradients of the tables. They are dense: zeros where no row was read."""
        ledger, load = self.ledger, self.load
        ledger.phase = "backward: embeddings"
        arriving = ledger.hold(WORKSPACE, x if self.text.learns or self.audio.learns else 0)
        for table, keys, more in ((self.text, load.rows, 0), (self.audio, load.rows * self.shape.num_codebooks, codes)):
            if not table.learns:
                continue
            scratch = ledger.hold(WORKSPACE, keys * TABLE_KEYS)
            if self.setup.device == "cpu" and more:
                scratch += ledger.hold(WORKSPACE, x + more)  # both gradients end to end
            if table.masters:
                ledger.hold(GRADIENTS, table.numel * table.width)
            else:
                self.gradient(table, cast=False)
            ledger.drop(WORKSPACE, scratch)
        ledger.drop(WORKSPACE, arriving + codes)
        ledger.drop(ACTIVATIONS, x)

    def update(self) -> None:
        """AdamW works in place."""
        self.ledger.phase = "update"
        for table in (self.text, self.audio):
            if table.masters:  # the gradients of their rows are copied out of the table's, which is freed
                self.ledger.hold(GRADIENTS, 4 * table.masters * table.inputs)
                self.ledger.drop(GRADIENTS, table.numel * table.width)

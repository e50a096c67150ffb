"""AdamW in little memory: moments in 8 bits, and weights in bf16 that lose no update to rounding.

Bytes per parameter, next to the gradient: 12 for float32 weights and moments, 6 (and 1/32 for the scales of blocks)
for those weights with 8-bit moments, 4 for bf16 weights with 8-bit moments, 6 with a Kahan term besides.

bf16 has 8 significant bits, so a weight of 1 next to updates of 3e-5 never moves when it is rounded to nearest: the
spacing is 4e-3 below 1 and 8e-3 above. Rounded stochastically, it moves by a whole spacing every now and then, and by
the right amount on average. With a Kahan term, what rounding took off is kept in a second bf16 number and added to the
next update; 8 more bits, so that only updates below about 1/130,000 of the weight still get lost.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Literal

import torch
from csm_kernels.constants import MOMENT_BLOCK, SMALLEST_8BIT
from torch import Tensor, nn

from csm_fast import ops
from csm_fast.system.errors import InputError
from csm_fast.train.optim.moving_rows import MovingRows
from csm_fast.train.optim.rounding import Keys, RoundingBits, round_stochastically, rounding_keys

log = logging.getLogger("csm_fast")

CHUNK = 1 << 22  # elements updated at once: at most 80 MiB of scratch, 19 bytes each
CPU_CHUNK = 1 << 19  # on a CPU: the pieces in float32 stay in its caches, 2.7 times the speed of CHUNK
FEWEST_PAGED = 100_000  # elements below which paging costs more than it saves, as in bitsandbytes

Rounding = Literal["stochastic", "kahan", "nearest"]


def chunk_on(device: torch.device) -> int:
    """Elements that an update on ``device`` widens to float32 at once."""
    return CPU_CHUNK if device.type == "cpu" else CHUNK


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), the mathematics of ``torch.optim.AdamW``.

    Every parameter is updated in float32: in one pass over memory, on CUDA by a Triton kernel and on a CPU, where the
    moments are in 32 bits, by the library built for the processor; else by PyTorch's fused kernel, a chunk at a time.
    Nothing asks the device for a value: where the attribute ``found_inf`` (a 0-dim float32 tensor on the parameters'
    device) is 1, weights, moments and step count stay as they are. Gradients are divided by the attribute
    ``grad_scale`` (such a tensor too) where there is one; PyTorch's kernel may do so where they lie.

    Where a matrix does not decay, what never had a gradient has no moments and stays as it is under any update: the one
    pass goes past it, by rows on a CPU. Of a table of embeddings these are the tokens that no recording holds.

    State of a parameter p, plain tensors all: ``step`` [] float32; ``exp_avg`` and ``exp_avg_sq`` like p in float32,
    or in uint8 with ``exp_avg_absmax`` and ``exp_avg_sq_absmax`` [ceil(numel / 256)] float32 beside them (blockwise
    dynamic quantisation, Dettmers et al., arXiv:2110.02861); under "kahan" also ``compensation`` like p in bf16.

    Args:
        params: contiguous parameters in float32 or bf16, or groups of them.
        bits: of the moments, 32 or 8 (needs bitsandbytes). bf16 weights have float32 moments too: in bf16,
            0.999 v == v.
        rounding: of bf16 weights. float32 weights are not rounded.
        seed: of stochastic rounding. Its draws are a function of (seed, place of the parameter in ``params``, its
            step count, place of the element), so a resumed run draws what an uninterrupted one does.
        paged: 8-bit moments in memory that CUDA moves between GPU and host; needs CUDA.
        chunk: elements at once, a multiple of 256; None: 2^19 on a CPU, 2^22 elsewhere. Changes scratch memory and
            speed, not results.

    Raises:
        InputError: ``bits`` is 8 and bitsandbytes is not installed.
        ValueError: a parameter of another dtype, or not contiguous; a chunk that is no multiple of 256.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: Literal[8, 32] = 32,
        rounding: Rounding = "stochastic",
        seed: int = 0,
        paged: bool = False,
        chunk: int | None = None,
    ):
        if chunk is not None and (chunk <= 0 or chunk % MOMENT_BLOCK):
            raise ValueError(f"chunk is {chunk}; use a multiple of {MOMENT_BLOCK}")
        self.bits, self.rounding, self.seed, self.paged, self.chunk = bits, rounding, seed, paged, chunk
        if bits == 8:
            _bitsandbytes_functional()
        self._maps: dict[torch.device, Tensor] = {}
        self._moving = MovingRows()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.dtype not in (torch.float32, torch.bfloat16) or not p.is_contiguous():
                    raise ValueError(f"a parameter {list(p.shape)} is {p.dtype} or not contiguous")

    # --------------------------------------------------------------------------------------------------- the state

    def state_form(self, p: Tensor) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of the state of ``p``."""
        quantized = self.bits == 8 and p.numel() >= SMALLEST_8BIT
        form: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"step": ((), torch.float32)}
        for name in ("exp_avg", "exp_avg_sq"):
            form[name] = tuple(p.shape), torch.uint8 if quantized else torch.float32
            if quantized:
                form[f"{name}_absmax"] = (-(-p.numel() // MOMENT_BLOCK),), torch.float32
        if self.rounding == "kahan" and p.dtype == torch.bfloat16:
            form["compensation"] = tuple(p.shape), torch.bfloat16
        return form

    def initial_state(self, p: Tensor) -> dict[str, Tensor]:
        """The state of ``p`` before its first update: zeros."""

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if self.paged and dtype == torch.uint8 and p.numel() >= FEWEST_PAGED and p.is_cuda:
                return _paged_zeros(_bitsandbytes_functional(), shape, p.device)
            return torch.zeros(shape, dtype=dtype, device=p.device)

        # A block's values are its codes' times its scale: whatever the codes, a scale of 0 makes them 0.
        return {name: zeros(*form) for name, form in self.state_form(p).items()}

    def __getstate__(self) -> dict[str, Any]:  # type: ignore[override]
        own = ("bits", "rounding", "seed", "paged", "chunk")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._maps, self._moving = {}, MovingRows()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's, but each tensor keeps its dtype: PyTorch's own casts moments to the weight's. The step
        count is float32, whatever it was."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(params, saved, strict=True):
            if i in state_dict["state"]:
                state = {k: v.to(p.device, copy=True) for k, v in state_dict["state"][i].items()}
                self.state[p] = {**state, "step": state["step"].to(torch.float32)}

    # -------------------------------------------------------------------------------------------------- the update

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what ``closure``, called first, returns."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group, index)
                index += 1
        return result

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """Update one parameter, exactly as ``step`` would."""
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p is parameter:
                    assert p.grad is not None
                    return self._update(p, p.grad, group, index)
                index += 1
        raise ValueError("the optimizer knows no such parameter")

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any], index: int) -> None:
        state = self.state[p]
        if not state:
            state.update(self.initial_state(p))
        step, skip = state["step"].add_(1), self.found_inf
        draws = rounding_keys(self.seed, index) if p.dtype == torch.bfloat16 and self.rounding == "stochastic" else None
        form = ops.choose("adamw", p.device, p.dtype, p, grad, state["exp_avg"]).impl
        if form == "reference":
            self._moving.forget(p)
            self._update_in_chunks(p, grad, group, state, draws)
        else:
            self._update_in_one_pass(form, p, grad, group, state, draws)
        if skip is not None:
            step.sub_(skip)

    def _update_in_one_pass(
        self, form: str, p: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Tensor], draws: Keys | None
    ) -> None:
        quantized = "exp_avg_absmax" in state
        moments = ops.Moments(
            state["exp_avg"],
            state["exp_avg_sq"],
            (state["exp_avg_absmax"], state["exp_avg_sq_absmax"]) if quantized else None,
            self._code_maps(p.device) if quantized else None,
        )
        beta1, beta2 = group["betas"]
        settings = ops.AdamWSettings(float(group["lr"]), beta1, beta2, group["weight_decay"], group["eps"], draws)
        ops.adamw_(
            form,
            p.detach(),
            grad.contiguous(),
            moments,
            state.get("compensation"),
            self._moving.of(form, p, group, state),
            state["step"],
            self.found_inf,
            self.grad_scale,
            settings,
        )
        # Bump the version counter, so that autograd detects the in-place update.
        torch.autograd.graph.increment_version(p)

    def _update_in_chunks(
        self, p: Tensor, grad: Tensor, group: dict[str, Any], state: dict[str, Tensor], keys: Keys | None
    ) -> None:
        step, skip = state["step"], self.found_inf
        flat = {name: t.view(-1) for name, t in state.items() if name != "step"}
        weights, grads = p.view(-1), grad.reshape(-1)
        bf16 = p.dtype == torch.bfloat16
        draws = None if keys is None else RoundingBits(keys, step, p.numel())
        maps = self._code_maps(p.device) if "exp_avg_absmax" in flat else None
        chunk = self.chunk or chunk_on(p.device)
        for first in range(0, p.numel(), chunk):
            some = slice(first, min(first + chunk, p.numel()))
            blocks = slice(first // MOMENT_BLOCK, -(-some.stop // MOMENT_BLOCK))
            weight = weights[some].float()  # itself where it is float32, as the gradient
            if "compensation" in flat:
                weight += flat["compensation"][some]
            if maps is None:
                moments = [flat["exp_avg"][some], flat["exp_avg_sq"][some]]
            else:
                moments = [
                    torch.ops.bitsandbytes.dequantize_blockwise(
                        flat[name][some], flat[f"{name}_absmax"][blocks], code, MOMENT_BLOCK, torch.float32
                    )
                    for name, code in zip(("exp_avg", "exp_avg_sq"), maps, strict=True)
                ]
            _adamw(weight, grads[some].float(), moments, step, group, skip, self.grad_scale)
            if maps is not None:
                for name, code in zip(("exp_avg", "exp_avg_sq"), maps, strict=True):
                    codes, absmax = _quantized(moments.pop(0), code, of_square=name == "exp_avg_sq")
                    # Quantising again what was dequantised is not the identity: a skipped update must not store it.
                    _store(flat[name][some], codes, skip)
                    _store(flat[f"{name}_absmax"][blocks], absmax, skip)
            if "compensation" in flat:
                rounded = weight.bfloat16()
                _store(weights[some], rounded, skip)
                _store(flat["compensation"][some], weight.sub_(rounded).bfloat16(), skip)
            elif bf16:
                # A bf16 number is its own rounding, either way, so a skipped update changes nothing.
                weights[some].copy_(weight if draws is None else round_stochastically(weight, first, draws))

    def _code_maps(self, device: torch.device) -> Tensor:
        """[2, 256] float32: the values in [-1, 1] and in [0, 1] that the codes of both moments stand for."""
        if device not in self._maps:
            maps = [_bitsandbytes_functional().create_dynamic_map(signed=signed) for signed in (True, False)]
            self._maps[device] = torch.stack(maps).to(device)
        return self._maps[device]


def _adamw(
    weight: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    step: Tensor,
    group: dict[str, Any],
    skip: Tensor | None,
    scale: Tensor | None,
) -> None:
    """``weight`` and ``moments`` in place: one kernel, and none of their elements is touched where ``skip`` is 1."""
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        [weight],
        [grad],
        [moments[0]],
        [moments[1]],
        [],
        [step],
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=scale,
        found_inf=skip,
    )


def _quantized(values: Tensor, code: Tensor, of_square: bool) -> tuple[Tensor, Tensor]:
    """Codes [n] and the largest magnitude of each block. A second moment gets no code of zero: where the gradient then
    is zero, as in rows of a table that a step does not read, the first moment would be divided by ``eps`` alone."""
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(values, code, MOMENT_BLOCK)
    return codes.clamp_(min=1) if of_square else codes, absmax


def _store(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """``target = value``, unless ``skip`` is 1."""
    target.copy_(value if skip is None else torch.where(skip == 1, target, value))


# ----------------------------------------------------------------------------------------------------- bitsandbytes


def _bitsandbytes_functional() -> Any:
    """``bitsandbytes.functional``; its import registers the operators used above.

    Raises:
        InputError: not installed, or it does not load on this machine.
    """
    from csm_fast.system.optional import INSTALL, quiet_import

    try:
        with quiet_import():
            import bitsandbytes.functional

            return bitsandbytes.functional
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(f"8-bit moments need bitsandbytes ({error})", mend=INSTALL) from None


def _paged_zeros(functional: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """uint8 zeros in CUDA's managed memory. bitsandbytes hands it out as a CPU tensor; here it is one of ``device``,
    so that every operator takes it."""
    with torch.cuda.device(device):
        host = functional.get_paged(*shape, dtype=torch.uint8, device=device)
    about = {"shape": shape, "typestr": "|u1", "data": (host.data_ptr(), False), "strides": None, "version": 2}
    paged = torch.as_tensor(SimpleNamespace(host=host, __cuda_array_interface__=about), device=device)
    return paged.zero_()


def can_page(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether paged moments are to be had: True on CUDA; elsewhere False, with a line that says so."""
    if all(p.is_cuda for p in parameters):
        return True
    log.info("Paged moments are for CUDA: here they are in 8 bits, but not paged.")
    return False

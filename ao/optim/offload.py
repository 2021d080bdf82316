"""`CPUOffloadOptimizer`: parameters and states of any optimizer in the memory of the host, one step at a time.

The device keeps the parameters that it computes with, and their gradients; a copy of the parameters and all states live on
the host, where the step is taken. What is copied overlaps with what is computed:

    backward    a gradient starts its way to the host, on a stream of its own, as soon as it is complete
    step        parameter by parameter in the order of their gradients: wait for the gradient, step on the host, start the
                way back; the copies of one run beside the steps of the others

Memory of the host that is copied from and to is pinned.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .sharded import is_dtensor


class _Offloaded:
    """A parameter of the device, its copy on the host, and an optimizer of that alone."""

    def __init__(self, p: Tensor, optimizer: type[torch.optim.Optimizer], settings: dict[str, Any]) -> None:
        self.p = p
        self.cuda = p.is_cuda
        self.stepped: torch.cuda.Event | None = None
        self.arrived: torch.cuda.Event | None = None
        self.copy = nn.Parameter(self._host(p), requires_grad=True)
        self.grad = self._host(p)
        self.more: Tensor | None = None
        self.has_grad = self.has_more = False
        self.version_of_grad: tuple[int, int] | None = None
        self.inner = optimizer([self.copy], **settings)
        self.upload()
        self.hook: Any = None

    def _host(self, p: Tensor) -> Tensor:
        return torch.empty(p.shape, dtype=p.dtype, pin_memory=self.cuda, device="cpu")

    def upload(self) -> None:
        """Take the parameter over as it is on the device."""
        self.wait()
        with torch.no_grad():
            self.copy.copy_(self.p.detach())
        self.known = self.now()

    def now(self) -> tuple[int, int]:
        """What changes when the parameter is written to, or gets other memory."""
        return self.p._version, self.p.data_ptr()

    def wait(self) -> None:
        """Until the copies that read or write the host's memory are done."""
        for event in (self.stepped, self.arrived):
            if event is not None:
                event.synchronize()
        self.stepped = self.arrived = None

    def fetch(self, grad: Tensor, stream: torch.cuda.Stream | None, target: Tensor) -> None:
        """Start to copy a gradient to the host."""
        if stream is None:
            target.copy_(grad)
            return
        stream.wait_stream(torch.cuda.current_stream(grad.device))
        with torch.cuda.stream(stream):
            target.copy_(grad, non_blocking=True)
            self.arrived = stream.record_event()
        grad.record_stream(stream)

    def send(self, stream: torch.cuda.Stream | None) -> None:
        """Start to copy the new parameter to the device."""
        with torch.no_grad():
            if stream is None:
                self.p.copy_(self.copy)
            else:
                with torch.cuda.stream(stream):
                    self.p.copy_(self.copy, non_blocking=True)
                    self.stepped = stream.record_event()
        self.known = self.now()


class CPUOffloadOptimizer(torch.optim.Optimizer):
    """An optimizer whose states, and a copy of the parameters, are on the host, which also takes the steps.

    params: as for any optimizer, (name, parameter) pairs included. The parameters stay where they are.
    optimizer_class: any class of optimizer; an instance of it is made for each parameter.
    offload_gradients: free a gradient on the device once it is on its way to the host. Gradients of several backward passes
        are added up there. `p.grad` is then None, so clip with `clip_grad_norm_` of this class, not with that of torch.
    minimal_size: smaller parameters are left to an optimizer on their own device.
    kwargs: for `optimizer_class`. `fused=True` is added for Adam and AdamW of torch.optim, whose CPU kernels are the fastest.

    Learning rates, schedulers and other settings act through `param_groups`, as usual. `clip_grad_norm_`, GradScaler and
    whatever else changes `p.grad` between backward and step is noticed, and so is a parameter that was written to since the
    last step, such as by `model.load_state_dict` (not through `p.data`, whose changes PyTorch does not count).

    Memory on the host: the parameters, their gradients and the states. Raises TypeError for DTensor parameters, for which
    FSDP2 has its own CPUOffloadPolicy.
    """

    def __init__(
        self,
        params: Any,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        offload_gradients: bool = False,
        minimal_size: int = 4096,
        **kwargs: Any,
    ) -> None:
        if optimizer_class in (torch.optim.Adam, torch.optim.AdamW) and not kwargs.keys() & {"fused", "foreach"}:
            kwargs["fused"] = True
        self.optimizer_class = optimizer_class
        self.offload_gradients = offload_gradients
        self.minimal_size = minimal_size
        self._offloaded: dict[Tensor, _Offloaded] = {}
        self._on_device: dict[Tensor, torch.optim.Optimizer] = {}
        self._arrived: dict[Tensor, None] = {}  # in their order
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._inner_kwargs = kwargs
        defaults = optimizer_class([nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))], **kwargs).defaults
        super().__init__(params, defaults)

    # Parameters.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim."""
        before = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        made: list[Tensor] = []
        try:
            for p in group["params"]:
                if is_dtensor(p):
                    raise TypeError(
                        "CPUOffloadOptimizer takes no DTensor; give fully_shard an offload_policy=CPUOffloadPolicy() instead"
                    )
                settings = self._settings(group)
                made.append(p)
                if p.numel() >= self.minimal_size:
                    self._offloaded[p] = _Offloaded(p, self.optimizer_class, {**self._inner_kwargs, **settings})
                    self._watch(self._offloaded[p])
                else:
                    self._on_device[p] = self.optimizer_class([p], **{**self._inner_kwargs, **settings})
        except Exception:
            for p in made:
                entry = self._offloaded.pop(p, None)
                if entry is not None and entry.hook is not None:
                    entry.hook.remove()
                self._on_device.pop(p, None)
            del self.param_groups[before:]
            raise

    def _settings(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a group that the constructor of the optimizer takes."""
        names = self.optimizer_class.__init__.__code__.co_varnames
        return {k: v for k, v in group.items() if k in names and k != "params"}

    def _watch(self, entry: _Offloaded) -> None:
        """Have a gradient copied as soon as it is there. A frozen parameter is watched when it is no longer."""
        if entry.hook is not None or not entry.p.requires_grad:
            return
        me = weakref.ref(self)  # autograd holds the hook where Python's garbage collection does not look for cycles

        def on_grad(p: Tensor) -> None:
            optimizer = me()
            if optimizer is not None:
                optimizer._on_grad(p)

        entry.hook = entry.p.register_post_accumulate_grad_hook(on_grad)

    def _stream(self, p: Tensor) -> torch.cuda.Stream | None:
        if not p.is_cuda:
            return None
        if p.device not in self._streams:
            self._streams[p.device] = torch.cuda.Stream(p.device)
        return self._streams[p.device]

    def _on_grad(self, p: Tensor) -> None:
        entry, grad = self._offloaded[p], p.grad
        assert grad is not None
        if grad.is_sparse:
            return  # step says what is wrong with it
        entry.wait()
        if self.offload_gradients and entry.has_grad:
            self._add_up(entry)
            entry.more = entry.more if entry.more is not None else entry._host(p)
            entry.fetch(grad, self._stream(p), entry.more)
            entry.has_more = True
        else:
            entry.fetch(grad, self._stream(p), entry.grad)
        entry.has_grad = True
        entry.version_of_grad = (grad._version, grad.data_ptr())
        self._arrived[p] = None
        if self.offload_gradients:
            p.grad = None

    @staticmethod
    def _add_up(entry: _Offloaded) -> None:
        entry.wait()
        if entry.has_more:
            assert entry.more is not None
            entry.grad.add_(entry.more)
            entry.has_more = False

    # Steps.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step. Returns what `closure` does, if it is given.

        Raises RuntimeError for a sparse gradient, before anything has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = {p: group for group in self.param_groups for p in group["params"]}
        for p in groups:
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(
                    "CPUOffloadOptimizer takes no sparse gradients; make the embedding with sparse=False"
                )
        for p, inner in self._on_device.items():
            inner.param_groups[0].update(self._live(groups[p]))
            inner.step()
        # In the order in which gradients arrived; those that came without the hook are copied now.
        late = [p for p in self._offloaded if p.grad is not None and p not in self._arrived]
        for p in late:
            self._watch(self._offloaded[p])
        for p in [*self._arrived, *late]:
            entry = self._offloaded[p]
            if not self.offload_gradients or p.grad is not None:
                if p.grad is None:  # set to None since: no step for it
                    continue
                if entry.version_of_grad != (p.grad._version, p.grad.data_ptr()):
                    entry.wait()
                    entry.fetch(p.grad, self._stream(p), entry.grad)
        for p in [*self._arrived, *late]:
            entry = self._offloaded[p]
            if p.grad is None and not (self.offload_gradients and entry.has_grad):
                continue
            self._add_up(entry)
            if entry.now() != entry.known:
                entry.upload()
            entry.copy.grad = entry.grad
            entry.inner.param_groups[0].update(self._live(groups[p]))
            entry.inner.step()
            entry.send(self._stream(p))
            entry.has_grad, entry.version_of_grad = False, None
        self._arrived.clear()
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)  # the next forward pass needs the new parameters
        self._show_states()
        return loss

    def _show_states(self) -> None:
        """Make the states of the inner optimizers those of the parameters, as code that reads `state` expects."""
        for group in self.param_groups:
            for p in group["params"]:
                inner = self._inner(p)
                held = inner.param_groups[0]["params"][0]
                if held in inner.state:
                    self.state[p] = inner.state[held]

    @staticmethod
    def _live(group: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in group.items() if k not in ("params", "param_names", "initial_lr")}

    def _inner(self, p: Tensor) -> torch.optim.Optimizer:
        return self._offloaded[p].inner if p in self._offloaded else self._on_device[p]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; gradients on the host are forgotten too."""
        super().zero_grad(set_to_none)
        for p in self._arrived:
            entry = self._offloaded[p]
            entry.wait()
            entry.has_grad = entry.has_more = False
            entry.version_of_grad = None
        self._arrived.clear()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm together is at most `max_norm`, wherever they are. Returns the norm before.

        `torch.nn.utils.clip_grad_norm_` does the same as long as gradients stay on the device.
        """
        grads: list[Tensor] = []
        for group in self.param_groups:
            for p in group["params"]:
                entry = self._offloaded.get(p)
                if p.grad is not None:
                    grads.append(p.grad)
                elif entry is not None and entry.has_grad:
                    self._add_up(entry)
                    grads.append(entry.grad)
        if not grads:
            return torch.zeros((), dtype=torch.float32, device="cpu")
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32).cpu() for g in grads]
        total = torch.linalg.vector_norm(torch.stack(norms))
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for g in grads:
            g.mul_(factor.to(g.device))
        return total

    # State dicts.

    def _keys(self) -> list[list[str]]:
        """The key of every parameter, by group: its name, or its number."""
        count = 0
        keys = []
        for group in self.param_groups:
            names = group.get("param_names") or [str(count + i) for i in range(len(group["params"]))]
            count += len(group["params"])
            keys.append([str(name) for name in names])
        return keys

    def state_dict(self) -> dict[str, Any]:
        """States by the name of their parameter where names are known, else by its number; settings by group.

        {"state": {key: {name: tensor}}, "param_groups": [{settings, "params": [keys]}]}
        """
        states = {}
        groups = []
        for group, keys in zip(self.param_groups, self._keys()):
            for key, p in zip(keys, group["params"]):
                state = self._inner(p).state_dict()["state"]
                if state:
                    states[key] = state[0]
            groups.append({**{k: v for k, v in group.items() if k not in ("params", "param_names")}, "params": keys})
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, for parameters of the same names.

        Raises ValueError, and changes nothing, where the names differ or a state does not fit.
        """
        mine, theirs = self._keys(), [list(group["params"]) for group in state_dict["param_groups"]]
        if mine != theirs:
            both = [set(itertools.chain.from_iterable(keys)) for keys in (mine, theirs)]
            odd = sorted(both[0] ^ both[1])[:5]
            raise ValueError(
                "CPUOffloadOptimizer.load_state_dict: the parameters differ"
                + (f", such as {', '.join(odd)}" if odd else " in their groups or order")
                + "; make the optimizer with the parameters that the state dict was saved with"
            )
        new: list[tuple[torch.optim.Optimizer, dict[str, Any]]] = []
        for own, group, keys in zip(self.param_groups, state_dict["param_groups"], mine):
            settings = {k: v for k, v in group.items() if k != "params"}
            for key, p in zip(keys, own["params"]):
                state = state_dict["state"].get(key)
                for name, t in (state or {}).items():
                    if isinstance(t, Tensor) and t.dim() and t.shape != p.shape:
                        raise ValueError(
                            f"CPUOffloadOptimizer.load_state_dict: the state {name!r} of {key!r} has shape "
                            f"{tuple(t.shape)}, the parameter {tuple(p.shape)}"
                        )
                inner = self._inner(p)
                saved = {"state": {} if state is None else {0: state}, "param_groups": [{**settings, "params": [0]}]}
                new.append((inner, saved))
        for inner, saved in new:
            inner.load_state_dict(saved)
        for own, group in zip(self.param_groups, state_dict["param_groups"]):
            own.update({k: v for k, v in group.items() if k != "params"})
        self.state = defaultdict(dict)
        self._show_states()

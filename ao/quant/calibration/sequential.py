"""Quantizing with calibration data, block after block.

A block sees its input as the quantized blocks before it leave it, and its layers are quantized in the order in which they
run, those that share an input together. At any time, one group of layers has statistics, and for each batch there is the
output of one block, twice where a recipe compares with the original model.

Nothing is assumed of the code around the blocks: the whole model is called each time, and the blocks that are done answer at
once with the output that is known. So masks, positions and caches are what they always are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ...matmul import set_parameter
from ..compiled import is_compiled, unwrapped
from ..report import progress
from .observers import Target
from .statistics import OBSERVERS, Statistics, check_finite_inputs, first_tensor

if TYPE_CHECKING:
    from ..quantize import Job  # which imports this file

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""One call of the model: its only argument, its arguments, or its keyword arguments."""

Finish = Callable[["Job", Statistics | None], None]
"""Quantizes the parameter of a job, and installs it."""


class _Stop(Exception):
    """Ends a run of the model when everything has been seen."""


def call(model: nn.Module, batch: Batch, what: str) -> Any:
    """Run a model on a batch. Raises ValueError for one that the model does not take.

    what: the batch in the words of the error, such as "calibration_data: batch 3".
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{what}, {_described(batch)}, does not run through the model: {error}; a batch is what one call of the model takes: "
            "a tensor, a tuple of arguments, or a dict of keyword arguments"
        ) from error


def _described(batch: Batch) -> str:
    """A batch by the shapes and dtypes of its tensors."""
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)} and {batch.dtype}"
    named = batch.items() if isinstance(batch, Mapping) else enumerate(batch)
    parts = [f"{k}: {tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in named]
    return f"a {type(batch).__name__} of {{{', '.join(parts)}}}"


@dataclass(eq=False)
class Stack:
    """Blocks that run one after the other, and what the last one that is done made of each batch, by stream."""

    blocks: list[nn.Module]
    done: int = 0
    outputs: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class Group:
    """Jobs that are quantized together: lists of jobs that share an input, and the layer that shows it."""

    parts: list[tuple[nn.Module, list[Job]]] = field(default_factory=list)


def quantize_in_sequence(
    model: nn.Module, jobs: Sequence[Job], batches: Sequence[Batch], device: torch.device | None, finish: Finish
) -> None:
    """Call `finish` for each job, with what was seen of its input, in the order in which the layers run.

    device: where the blocks are moved before they run; None leaves them where they are.

    Raises ValueError for a batch that the model does not take, or that gives a layer inputs that are not finite.
    """
    wants_original = any(job.recipe.wants_target for job in jobs)
    with _Runner(unwrapped(model), batches, device, wants_original) as runner:
        waiting = list(jobs)
        units: list[tuple[Stack | None, nn.Module]] = [(s, block) for s in runner.stacks(jobs) for block in s.blocks]
        units.append((None, runner.model))
        for stack, unit in progress(units, "quantize"):
            inside = set(unit.modules())
            mine = [job for job in waiting if any(owner in inside for owner in job.owners)]
            waiting = [job for job in waiting if job not in mine]
            if device is not None:
                unit.to(device)
            runner.unit(unit, mine, finish)
            if stack is not None and waiting:
                runner.advance(stack)


class _Runner:
    """Runs the model on the batches, with the blocks that are done answering for themselves."""

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], device: torch.device | None, wants_original: bool
    ) -> None:
        self.model, self.batches, self.device = model, batches, device
        self.streams = ["original", "now"] if wants_original else ["now"]
        self.batch, self.stream = 0, "now"
        self.kept = [next((t.device for t in tree_leaves(b) if isinstance(t, Tensor)), None) for b in batches]

    def __enter__(self) -> _Runner:
        self.context = ExitStack()
        self.context.enter_context(torch.no_grad())
        if is_compiled(self.model):
            self.context.enter_context(torch.compiler.set_stance("force_eager"))
        for module in [m for m in self.model.modules() if m.training]:
            module.training = False
            self.context.callback(setattr, module, "training", True)
        return self

    def __exit__(self, *error: Any) -> None:
        self.context.close()

    def call(self, batch: int, stream: str, hooks: Sequence[Any]) -> None:
        """Run the model on a batch, until a hook says stop. hooks: handles, which are removed."""
        self.batch, self.stream = batch, stream
        arguments = self.batches[batch]
        if self.device is not None:
            arguments = tree_map_only(Tensor, lambda t: t.to(self.device), arguments)
        try:
            call(self.model, arguments, f"calibration_data: batch {batch}")
        except _Stop:
            pass
        finally:
            for handle in hooks:
                handle.remove()

    def stacks(self, jobs: Sequence[Job]) -> list[Stack]:
        """The lists of blocks of one type that hold jobs and run once each, one after the other, in the order in which they
        run. Runs the first batch. Moves everything else to the device."""
        owners = {owner for job in jobs for owner in job.owners}
        found: list[Stack] = []
        inside: set[nn.Module] = set()  # of the lists, and what is below them
        for module in self.model.modules():
            if not isinstance(module, (nn.ModuleList, nn.Sequential)) or module in inside:
                continue
            blocks = list(module.children())
            held = [owners & set(block.modules()) for block in blocks]
            if len(blocks) > 1 and len({type(b) for b in blocks}) == 1 and any(held) and not owners & set(blocks):
                found.append(Stack(blocks))
                inside.update(module.modules())
        calls: list[nn.Module] = []
        handles = []
        for block in (block for stack in found for block in stack.blocks):
            handles.append(block.register_forward_pre_hook(lambda module, _: calls.append(module)))
            if self.device is not None:
                handles += self.visit(block, self.device)
        if self.device is not None:
            for module in self.model.modules():
                if module not in inside:
                    module._apply(lambda t: t.to(self.device), recurse=False)
        self.call(0, "now", handles)
        order = {block: i for i, block in enumerate(calls)}
        fine = [s for s in found if [c for c in calls if c in set(s.blocks)] == s.blocks]
        return sorted(fine, key=lambda stack: order[stack.blocks[0]])

    def visit(self, block: nn.Module, device: torch.device) -> list[Any]:
        """Hooks that have a block on the device for its run only."""
        home = next((p.device for p in block.parameters()), device)

        def move(module: nn.Module, to: torch.device) -> None:
            module.to(
                to
            )  # which returns the module, and what a hook returns would stand for the block's input or output

        there = block.register_forward_pre_hook(lambda module, _: move(module, device))
        return [there, block.register_forward_hook(lambda module, _, __: move(module, home), always_call=True)]

    def unit(self, unit: nn.Module, jobs: list[Job], finish: Finish) -> None:
        """Quantize the jobs of a block, or those of the whole model that are left."""
        self.done: list[tuple[Job, nn.Parameter, nn.Parameter]] = []
        self.entry = unit
        for job in [job for job in jobs if not job.needs]:
            self.finish(job, None, finish)
        for group in self.groups(unit, [job for job in jobs if job.needs]):
            for job, seen in self.observe(unit, group):
                self.finish(job, seen, finish)

    def finish(self, job: Job, seen: Statistics | None, finish: Finish) -> None:
        original = job.parameter
        finish(job, seen)
        self.done.append((job, original, job.parameter))

    def groups(self, unit: nn.Module, jobs: list[Job]) -> list[Group]:
        """Jobs in the order in which they run in the first batch. Those of one input are one part; parts of one name, but
        for numbers in it (the experts of a layer), are one group. Layers that did not run come last."""
        if not jobs:
            return []
        by_owner = {owner: job for job in jobs for owner in job.owners}
        inputs: list[tuple[Tensor, nn.Module]] = []
        self.runs: Counter[nn.Module] = Counter()

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs.append((first_tensor(args, kwargs), module))
            self.runs[module] += 1

        handles = [owner.register_forward_pre_hook(hook, with_kwargs=True) for owner in by_owner]
        handles.append(unit.register_forward_hook(_stop))
        self.call(0, "now", handles)
        parts: dict[int, tuple[nn.Module, list[Job]]] = {}
        seen: set[str] = set()
        for x, owner in inputs:
            job = by_owner[owner]
            if job.fqn not in seen and len(job.owners) == 1:
                seen.add(job.fqn)
                parts.setdefault(id(x), (owner, []))[1].append(job)
        groups: dict[str, Group] = {}
        for owner, part in parts.values():
            groups.setdefault(re.sub(r"\d+", "#", part[0].fqn), Group()).parts.append((owner, part))
        late = Group([(job.owners[0], [job]) for job in jobs if job.fqn not in seen])
        return [*groups.values(), *([late] if late.parts else [])]

    def observe(self, unit: nn.Module, group: Group) -> Iterator[tuple[Job, Statistics]]:
        """Run all batches, and give each job of the group its statistics."""
        shared: dict[nn.Module, Statistics] = {}
        targets: dict[str, Target] = {}
        for owner, part in group.parts:
            needed = frozenset().union(*(job.needs for job in part))
            shared[owner] = Statistics({name: OBSERVERS[name]() for name in OBSERVERS if name in needed})
            targets.update({job.fqn: Target() for job in part if job.recipe.wants_target})
        # Where a weight has several owners, the inputs of all of them count.
        shows = {
            layer: owner for owner, part in group.parts for layer in (part[0].owners if len(part) == 1 else [owner])
        }
        for batch in range(len(self.batches)):
            before, _ = self.inputs(unit, batch, "original", shows) if targets else ({}, 0)
            now, tokens = self.inputs(unit, batch, "now", shows)
            for owner, part in group.parts:
                for x in (*before.get(owner, []), *now.get(owner, [])):
                    if x.shape[-1] != (
                        width := part[0].parameter.shape[-1]
                    ):  # the run has ended before the layer would say it
                        raise ValueError(
                            f"calibration_data: batch {batch}, {_described(self.batches[batch])}, gives {part[0].fqn} inputs of "
                            f"{x.shape[-1]} features, and it takes {width}; give batches as the model takes them"
                        )
                    check_finite_inputs(x, part[0].fqn, f"batch {batch} of the calibration data")
                for x in now.get(owner, []):
                    shared[owner].observe(x)
                aligned = _aligned(before.get(owner, []), now.get(owner, []), tokens)
                for job in [job for job in part if job.fqn in targets]:
                    if aligned:
                        targets[job.fqn].observe(before[owner][0], now[owner][0], job.parameter)
                    else:
                        del targets[job.fqn]  # tokens that were routed elsewhere have no counterpart
        for owner, part in group.parts:
            for job in part:
                yield job, replace(shared[owner], target=targets.get(job.fqn))

    def inputs(
        self, unit: nn.Module, batch: int, stream: str, shows: Mapping[nn.Module, nn.Module]
    ) -> tuple[dict[nn.Module, list[Tensor]], int]:
        """What comes into layers in one run of a batch, by their value in `shows`, and the tokens that come into the unit."""
        found: dict[nn.Module, list[Tensor]] = {}
        tokens: list[int] = []
        # Layers that run once each: the last of them ends the run.
        most = len(shows) if all(self.runs[layer] == 1 for layer in shows) else None

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            tokens.append(_tokens(args, kwargs))

        def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(shows[module], []).append(first_tensor(args, kwargs))
            if sum(map(len, found.values())) == most:
                raise _Stop

        hooks = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in shows]
        hooks.append(unit.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(unit.register_forward_hook(_stop))
        with self.originals() if stream == "original" else nullcontext():
            self.call(batch, stream, hooks)
        return found, tokens[0] if tokens else 0

    @contextmanager
    def originals(self) -> Iterator[None]:
        """The layers of the unit that are quantized as they were."""
        try:
            for job, original, _ in self.done:
                job.install(original)
            yield
        finally:
            for job, _, made in self.done:
                job.install(made)

    def advance(self, stack: Stack) -> None:
        """From here on, the next block of a stack answers with its output, and so do those before it."""
        block = stack.blocks[stack.done]
        outputs: dict[str, list[Any]] = {}
        for stream in self.streams:
            outputs[stream] = []

            def keep(module: nn.Module, args: Any, output: Any, into: list[Any] = outputs[stream]) -> None:
                place = self.kept[self.batch]
                into.append(tree_map_only(Tensor, lambda t: t.to(place or t.device), output))
                raise _Stop

            for batch in range(len(self.batches)):
                with self.originals() if stream == "original" else nullcontext():
                    self.call(batch, stream, [block.register_forward_hook(keep)])
        stack.outputs = outputs
        stack.done += 1
        self.replace_forward(block, stack)

    def replace_forward(self, block: nn.Module, stack: Stack) -> None:
        def answer(*args: Any, **kwargs: Any) -> Any:
            output = stack.outputs[self.stream][self.batch]
            return tree_map_only(Tensor, lambda t: t.to(self.device or t.device), output)

        before = block.__dict__.get("forward")
        block.__dict__["forward"] = answer

        def restore() -> None:
            if before is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = before

        self.context.callback(restore)


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Stop


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The tokens of a call: rows of its first tensor, or elements if those are ids."""
    x = next(
        (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)),
        torch.empty(0, dtype=torch.float32, device="cpu"),
    )
    return x.numel() // (x.shape[-1] if x.is_floating_point() and x.dim() else 1)


def _aligned(before: list[Tensor], now: list[Tensor], tokens: int) -> bool:
    """Whether row i of the inputs of a layer is the same token: it ran once either time, and nothing was picked out."""
    if len(before) != 1 or len(now) != 1:
        return False
    return before[0].shape == now[0].shape and before[0].numel() == tokens * before[0].shape[-1]


@contextmanager
def restored_on_error(model: nn.Module, jobs: Sequence[Job], device: torch.device | None) -> Iterator[None]:
    """Should the context end in an error, the model is as it was: the parameters that jobs replace, the biases of their
    layers and, with a device, the places of all tensors."""
    slots = [(slot.owner, slot.name) for job in jobs for slot in job.slots]
    slots += [(owner, "bias") for job in jobs for owner in job.owners if "bias" in owner._parameters]
    before = [(owner, name, owner._parameters[name]) for owner, name in slots]
    places = [] if device is None else [(p, p.data) for p in model.parameters()]
    buffers = [] if device is None else [(m, name, b) for m in model.modules() for name, b in m._buffers.items()]
    try:
        yield
    except BaseException:
        for owner, name, parameter in before:
            set_parameter(owner, name, parameter)
        for t, data in places:
            t.data = data
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        raise

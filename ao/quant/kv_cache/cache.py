"""`KVCache`: the keys and values of one layer, quantized as they are written, and read by attention as they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dtypes import QTensor, Spec
from ...matmul import Sight, attend_fields, encode_fields, register_form, tensor_of
from ..algorithms.hadamard import random_hadamard
from .config import KVCacheConfig, kv_cache_config, tokens_of

TOGETHER = 16
"""Tokens of keys and values that are quantized in one in eager mode, at most."""


class KVCache:
    """Keys and values of `max_length` tokens, (B, kv_heads, max_length, head_dim), in memory that stays where it is.

    config: a name ("int8", "int4", "kivi4", "kivi2", "float8"), a `KVCacheConfig`, or a Spec.
    dtype: of what stays in floating point.
    value_dim: of a value, where it is not head_dim.

    `update` appends tokens at `length`, a tensor on the device, so that a compiled graph or a CUDA graph can do it, and `attend`
    reads all that is there. Nothing that is there is quantized again.

    Raises ValueError where a block does not divide head_dim, or fewer than 8 bits cannot be packed along it.
    """

    def __init__(
        self,
        config: str | KVCacheConfig | Spec,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        self.config = config = kv_cache_config(config)
        self.batch, self.kv_heads, self.max_length = batch, kv_heads, max_length
        self.dtype, self.device = dtype, torch.empty(0, device=device).device
        self.dims = head_dim, head_dim if value_dim is None else value_dim
        self.length = torch.zeros((), dtype=torch.int64, device=device)
        for name, spec, dim in (("k", config.k, self.dims[0]), ("v", config.v, self.dims[1])):
            if getattr(spec, "bits", 8) < 8 and dim % 8:
                raise ValueError(f"KVCache: head_dim must be a multiple of 8 to pack {name} by {spec}, got {dim}")
        # Fields as plain tensors: a graph that holds a subclass takes it apart in Python at every call.
        self.k_fields, self.k_form = self._room(config.k, self.dims[0])
        self.v_fields, self.v_form = self._room(config.v, self.dims[1])
        self.turns = [Turn.of(d, dtype, self.device) if config.rotate else None for d in self.dims]
        # One place more, for what is not among the first tokens.
        self.first = [self._plain(config.first + 1, d) for d in self.dims] if config.first else []
        self.recent = [self._plain(config.residual, d) for d in self.dims] if config.residual else []
        self.oldest = torch.zeros_like(self.length)  # position from which on `recent` has all

    def _room(self, spec: Spec, dim: int) -> tuple[list[Tensor], str]:
        """Zeros for the fields of so many tokens, and the name of their form."""
        tokens = self.config.tokens
        # A block more, of which a write may name one that is not there.
        length = -(-self.max_length // 8) * 8 if tokens == 1 else (-(-self.max_length // tokens) + 1) * tokens
        shape = self.batch, self.kv_heads, length, dim
        fields, form = register_form(spec, shape, self.dtype)
        return [torch.zeros(t.shape, dtype=t.dtype, device=self.device) for t in fields], form

    def _plain(self, tokens: int, dim: int) -> Tensor:
        return torch.zeros(self.batch, self.kv_heads, tokens, dim, dtype=self.dtype, device=self.device)

    @property
    def keys(self) -> QTensor:
        """The keys as they are stored, rotated if the config says so; (B, kv_heads, tokens, head_dim), at least `max_length`."""
        return tensor_of(self.k_form, self.k_fields)

    @property
    def values(self) -> QTensor:
        """The same of the values."""
        return tensor_of(self.v_form, self.v_fields)

    def tensors(self) -> list[Tensor]:
        """All memory that `update` writes, and what it reads."""
        turns = [t for turn in self.turns if turn is not None for t in turn]
        return [*self.k_fields, *self.v_fields, *self.first, *self.recent, *turns, self.length, self.oldest]

    @property
    def nbytes_packed(self) -> int:
        """Bytes of storage."""
        return sum(t.nbytes for t in self.tensors())

    def takes(self, keys: Tensor, values: Tensor) -> bool:
        """Whether it is for keys and values of these sizes, whatever the number of tokens."""
        wanted = [(self.batch, self.kv_heads, dim) for dim in self.dims]
        return [(*x.shape[:2], x.shape[3]) for x in (keys, values)] == wanted

    def check(self, tokens: int) -> None:
        """Raise ValueError unless there is room for so many tokens more. It waits for the device."""
        if int(self.length) + tokens > self.max_length:
            raise ValueError(
                f"KVCache: {int(self.length)} tokens and {tokens} more are longer than max_length={self.max_length}; make the "
                "cache longer, or the context shorter"
            )

    def update(self, keys: Tensor, values: Tensor, check: bool = True) -> None:
        """Append the keys and values of T tokens, (B, kv_heads, T, head_dim). They alone are quantized.

        check: look first whether they fit, where that is possible: not in a graph.

        Raises ValueError, before anything is written, for a shape that is not that of the cache, or too many tokens.
        """
        for name, x, dim in (("keys", keys, self.dims[0]), ("values", values, self.dims[1])):
            if (x.shape[0], x.shape[1], x.shape[3]) != (self.batch, self.kv_heads, dim) or x.shape[2] != keys.shape[2]:
                wanted = (self.batch, self.kv_heads, keys.shape[2], dim)
                raise ValueError(f"KVCache.update: {name} must have shape {wanted}, got {tuple(x.shape)}")
        tokens = keys.shape[2]
        if tokens > self.max_length:
            raise ValueError(f"KVCache: {tokens} tokens are longer than max_length={self.max_length}")
        if check and not torch.compiler.is_compiling():
            self.check(tokens)
        keys, values = (x if turn is None else rotated(x, turn.into) for x, turn in zip((keys, values), self.turns))
        at = self.length + torch.arange(tokens, device=self.device)
        alike = self.config.k == self.config.v and self.dims[0] == self.dims[1] and keys.dtype == values.dtype
        if tokens <= TOGETHER and alike and self.config.tokens == 1 and not torch.compiler.is_compiling():
            self._store_both(torch.cat([keys, values]), at)
        else:
            self._store(self.k_fields, self.k_form, self.config.k, keys, at, 0)
            self._store(self.v_fields, self.v_form, self.config.v, values, at, 1)
        for where, x in zip(self.first, (keys, values)):
            few = min(tokens, self.config.first)
            where.index_copy_(2, at[:few].clamp(max=self.config.first), x[:, :, :few].to(self.dtype))
        for where, x in zip(self.recent, (keys, values)):
            few = min(tokens, self.config.residual)
            where.index_copy_(2, at[-few:] % self.config.residual, x[:, :, -few:].to(self.dtype))
        self.length.add_(tokens)

    def _store(self, fields: list[Tensor], form: str, spec: Spec, x: Tensor, at: Tensor, which: int) -> None:
        """Quantize x (B, kv_heads, T, dim) and put it at the positions `at` (T,). Blocks of tokens are written whole: with what
        the residual has of the first one, and something in place of what is still to come of the last one."""
        tokens = tokens_of(spec)
        if tokens > 1:
            count = (at.shape[0] + tokens - 2) // tokens + 1
            start = at[:1] // tokens * tokens
            positions = start + torch.arange(count * tokens, device=self.device)
            ring = self.recent[which]
            new = (positions - at[:1]).clamp(max=at.shape[0] - 1) + ring.shape[2]
            source = torch.cat([ring, x.to(ring.dtype)], 2)
            x = source.index_select(2, torch.where(positions < at[:1], positions % ring.shape[2], new))
            at = start // tokens + torch.arange(count, device=self.device)
        for field, new in zip(fields, encode_fields(x, form)):
            if field.dim() != 4:
                continue  # a table, the same for all
            blocks = at.shape[0]
            if new.shape[2] != blocks:
                field, new = (t.unflatten(2, (-1, tokens)) for t in (field, new))
            _bytes(field).index_copy_(2, at, _bytes(new))

    def _store_both(self, both: Tensor, at: Tensor) -> None:
        """Quantize keys and values of few tokens as one, (2 B, kv_heads, T, dim), and put them at the positions `at` (T,). It
        takes half the launches; a compiler fuses better without."""
        for k, v, new in zip(self.k_fields, self.v_fields, encode_fields(both, self.k_form)):
            if k.dim() == 4:
                for field, part in zip((k, v), _bytes(new).chunk(2)):
                    _bytes(field).index_copy_(2, at, part)

    def attend(
        self,
        q: Tensor,
        mask: Tensor | None = None,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the newest T tokens, whose keys and values are in the cache, to all of it: (B, heads, T, value_dim).

        q: (B, heads, T, head_dim). A query sees its own token and those before it, `window` of them if given, and of these what
        `mask` (B or 1, heads or 1, T, max_length) says: bool, True for what is seen, or a number to add to the scores.
        scale, softcap, sinks: as in `ao.matmul.attention`.
        """
        config, turn, back = self.config, *self.turns
        if turn is not None:
            q = rotated(q, turn.back)
        stop: Tensor = self.length
        exact: list[Tensor] = []
        if config.first:
            where = torch.arange(config.first + 1, device=self.device)
            exact += [*self.first, torch.where(where < torch.clamp(self.length, max=config.first), where, -1)]
        if config.residual:
            stop, where = self._recent_positions()
            exact += [*self.recent, where]
        sight = Sight(config.first, stop, self.length, window, mask)
        out = attend_fields(
            q, self.k_fields, self.v_fields, self.k_form, self.v_form, sight, scale, softcap, sinks, exact
        )
        return out if back is None else rotated(out, back.back.t())

    def _recent_positions(self) -> tuple[Tensor, Tensor]:
        """From which position on `recent` answers, and the position of each of its places, -1 where the others do."""
        config, n = self.config, self.length
        tokens, size = config.tokens, config.residual
        # All blocks but the unfinished one, and the newest ones that fit beside it.
        begin = torch.clamp(n // tokens * tokens - (size - tokens), min=0)
        begin = torch.maximum(begin, (self.oldest + tokens - 1) // tokens * tokens)
        last = n - 1
        where = last - (last - torch.arange(size, device=self.device)) % size
        return begin, torch.where(where >= torch.clamp(begin, min=config.first), where, -1)

    def read(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The first keys and values as numbers, (B, kv_heads, tokens, head_dim) in `dtype`: for attention that cannot read codes.
        Positions that hold no token yet have some number."""
        where = torch.arange(tokens, device=self.device)
        plain = []
        for i, q in enumerate((self.keys, self.values)):
            x = q.dequantize()[:, :, :tokens].to(self.dtype)
            if self.config.residual:
                begin, _ = self._recent_positions()
                x = torch.where((where >= begin)[:, None], self.recent[i][:, :, where % self.config.residual], x)
            if self.config.first:
                index = where.clamp(max=self.config.first)
                x = torch.where((where < self.config.first)[:, None], self.first[i][:, :, index], x)
            turn = self.turns[i]
            plain.append(x if turn is None else rotated(x, turn.back.t()))
        return plain[0], plain[1]

    def crop(self, tokens: int) -> None:
        """Forget the newest tokens. Raises ValueError for more than there are, or than the residual window can take back."""
        if not 0 <= tokens <= int(self.length):
            raise ValueError(f"KVCache.crop: tokens must be 0 to {int(self.length)}, got {tokens}")
        config = self.config
        if config.tokens > 1 and tokens < int(self.length) and tokens > config.residual - config.tokens:
            raise ValueError(
                f"KVCache.crop: with residual={config.residual}, at most {config.residual - config.tokens} tokens can be taken "
                f"back, got {tokens}; make the residual longer"
            )
        if config.residual:
            torch.maximum(self.oldest, self.length - config.residual, out=self.oldest)
        self.length.sub_(tokens)

    def reset(self) -> None:
        """Forget all tokens."""
        self.length.zero_()
        self.oldest.zero_()

    def reorder(self, index: Tensor) -> None:
        """Sequence i becomes what sequence index[i] was, in place: (B,), as beam search asks."""
        for t in self._sequences():
            _bytes(t).copy_(_bytes(t).index_select(0, index.to(self.device)))

    def select(self, index: Tensor) -> KVCache:
        """A cache of the sequences `index`, any number of them, in memory of its own."""
        index = index.to(self.device)
        index = index.nonzero().squeeze(-1) if index.dtype == torch.bool else index
        other = KVCache(self.config, len(index), self.kv_heads, self.max_length, self.dims[0], **self._common())
        for mine, its in zip(self._sequences(), other._sequences()):
            _bytes(its).copy_(_bytes(mine).index_select(0, index))
        other.length.copy_(self.length)
        other.oldest.copy_(self.oldest)
        return other

    def grown(self, max_length: int) -> KVCache:
        """The same with room for more tokens, in other memory."""
        other = KVCache(self.config, self.batch, self.kv_heads, max_length, self.dims[0], **self._common())
        for mine, its in zip(self._sequences(), other._sequences()):
            _bytes(its).narrow(2, 0, mine.shape[2]).copy_(_bytes(mine))
        other.length.copy_(self.length)
        other.oldest.copy_(self.oldest)
        return other

    def _common(self) -> dict[str, Any]:
        return {"value_dim": self.dims[1], "dtype": self.dtype, "device": self.device}

    def _sequences(self) -> list[Tensor]:
        return [*self.k_fields, *self.v_fields, *self.first, *self.recent]


class Turn(NamedTuple):
    """A rotation H of the last dim in two factors, a multiple each, whose product is one: x @ into is what is stored, and
    q @ back meets it in the same scores, as (q H) (H^T k). `into` @ `back`.t() = 1.

    The entries of `back` are 1 and -1 where there is such a matrix, so that 16 bits hold both exactly.
    """

    into: Tensor
    back: Tensor

    @staticmethod
    def of(dim: int, dtype: torch.dtype, device: torch.device) -> Turn:
        """For numbers of `dtype`, in which both factors are if they are exact."""
        turn = random_hadamard(dim)
        signs = (turn * dim**0.5).round()
        factors = Turn(signs / dim, signs)
        exact = torch.equal(signs.abs(), torch.ones_like(signs))
        if exact and all(torch.equal(t.to(dtype).double(), t) for t in factors):
            return Turn(*(t.to(device, dtype) for t in factors))
        return Turn(*(turn.to(device, torch.float32) for _ in factors))


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """x @ turn over the last dim, as x's dtype."""
    return (x.to(turn.dtype) @ turn).to(x.dtype)


def _bytes(t: Tensor) -> Tensor:
    """float8 as uint8: not every operator knows float8."""
    return t.view(torch.uint8) if t.dtype.is_floating_point and t.element_size() == 1 else t

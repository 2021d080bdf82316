"""Caches of transformers whose keys and values are quantized, and are read by attention as they are.

    from ao.integrations.transformers import QuantizedCache

    cache = QuantizedCache(model.config, "int4", max_cache_len=32768)
    model.generate(**inputs, past_key_values=cache)

An attention function of transformers never sees the cache: all it gets is what the layer's `update` returns. Here that is the
`KVCache` itself, for which the function "sdpa" of transformers knows another way.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, StaticCache, StaticLayer

from ..dtypes import Spec
from ..quant.kv_cache import KVCache, KVCacheConfig, kv_cache_config

READING = "sdpa"
"""The attention of transformers that reads a cache as it is. Others get keys and values that are decoded."""

STEP = 256
"""A cache that grows has room for a multiple of so many tokens, and for an eighth more than it needs."""


class QuantizedLayer(CacheLayerMixin):
    """The keys and values of one layer.

    max_cache_len: the tokens that there is room for; None for a layer that grows.
    model_config: says how the model computes attention.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, config: KVCacheConfig, model_config: Any, max_cache_len: int | None = None) -> None:
        super().__init__()
        self.config, self.model_config, self.max_cache_len = config, model_config, max_cache_len
        self.is_compileable = max_cache_len is not None
        self.seen = 0  # of a layer that grows
        self.is_unused = True

    kv: KVCache

    # Not in a graph, to which the memory would not be static: `generate` compiles prompts that it reads in chunks.
    @_disable_dynamo  # torch.compiler.disable would import the compiler
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the memory for keys and values like these."""
        batch, heads, tokens, dim = key_states.shape
        length = self.max_cache_len or _room(tokens)
        self.kv = KVCache(
            self.config, batch, heads, length, dim, value_dim=value_states.shape[-1], dtype=key_states.dtype,
            device=key_states.device,
        )  # fmt: skip
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, batch
        if self.is_compileable:
            for t in self.kv.tensors():
                torch._dynamo.mark_static_address(t)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Append keys and values. What comes back stands for all of them: the cache, for attention that reads it, or the numbers.

        Raises ValueError for more tokens than `max_cache_len`, before anything is written.
        """
        if not self.is_initialized or (not self.kv.takes(key_states, value_states) and self.is_unused):
            # Made ahead, it may be for other sequences or heads.
            self.lazy_initialization(key_states, value_states)
        self.is_unused = False
        tokens = key_states.shape[2]
        if self.max_cache_len is None:
            if self.seen + tokens > self.kv.max_length:
                self.kv = self.kv.grown(_room(self.seen + tokens))
            self.seen += tokens
        # A layer of fixed length is asked in `get_mask_sizes`, once for all layers; a GPU that is asked has to be waited for.
        self.kv.update(key_states, value_states, check=self.max_cache_len is not None and not key_states.is_cuda)
        if self.model_config._attn_implementation == READING:
            return self.kv, self.kv
        return self.kv.read(self.max_cache_len or self.seen)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length of the mask, and the position of its first column."""
        if self.max_cache_len is None:
            return self.seen + query_length, 0
        if not torch.compiler.is_compiling():
            if self.is_initialized:
                self.kv.check(query_length)
            elif query_length > self.max_cache_len:
                raise ValueError(
                    f"QuantizedCache: {query_length} tokens are more than max_cache_len={self.max_cache_len}"
                )
        return self.max_cache_len, 0

    def get_seq_length(self) -> Any:
        """The tokens that are there: a tensor where a graph may ask."""
        if self.max_cache_len is None:
            return self.seen
        return self.kv.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """The tokens that there is room for, -1 if it grows."""
        return self.max_cache_len or -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.seen = 0
        if self.is_initialized:
            self.kv.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; the number is negative, as transformers has it."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes how many tokens to remove as a negative number, got {tokens_to_remove}")
        if tokens_to_remove and self.is_initialized:
            self.kv.crop(-tokens_to_remove)
            self.seen = max(self.seen + tokens_to_remove, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was."""
        if self.is_initialized:
            self.kv.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.kv.batch, device=self.kv.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        if self.is_initialized:
            self.kv = self.kv.select(indices)
            self.batch_size = self.kv.batch

    def offload(self) -> None:
        """Refused: it is packed where it is."""
        raise NotImplementedError(
            "QuantizedCache cannot be offloaded to the CPU; use fewer bits, or transformers' own caches"
        )

    prefetch = offload


def _room(tokens: int) -> int:
    return -(-(tokens + tokens // 8) // STEP) * STEP


class QuantizedCache(Cache):
    """A cache of quantized keys and values for `generate(past_key_values=...)`, or for calls of the model.

    config: that of the model.
    scheme: "int8", "int4", "kivi4", "kivi2", "float8", a `KVCacheConfig`, or a Spec for both keys and values.
    max_cache_len: the tokens that there is room for, in memory that stays where it is, so that `generate` compiles its steps.
        None: it grows.
    k, v: Specs of keys and values in place of those of the scheme.

    Layers that see a window of tokens alone keep that window in floating point, as transformers does. Attention reads the codes
    with attn_implementation="sdpa", which is transformers' default; others get decoded keys and values, at their cost in memory.
    Before `generate(prefill_chunk_size=...)` call `initialize_for`.

    Raises ValueError for an unknown scheme, and for an encoder-decoder model.
    """

    def __init__(
        self,
        config: Any,
        scheme: str | KVCacheConfig | Spec | None = None,
        max_cache_len: int | None = None,
        *,
        k: Spec | None = None,
        v: Spec | None = None,
    ) -> None:
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"QuantizedCache is for decoder-only models; {config.model_type} has an encoder, whose keys and values another "
                "cache would have to hold. Use transformers' own caches"
            )
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"QuantizedCache: max_cache_len must be 1 or more tokens, or None, got {max_cache_len}")
        _let_attention_read()
        text = config.get_text_config(decoder=True)
        self.scheme = kv_cache_config(scheme, k=k, v=v)
        own = DynamicCache(config=text) if max_cache_len is None else StaticCache(text, max_cache_len)
        count = len(own.layers)
        layers = [
            QuantizedLayer(self.scheme, text, max_cache_len)
            if type(layer) in (DynamicLayer, StaticLayer) and not self.scheme.is_full(i, count)
            else layer
            for i, layer in enumerate(own.layers)
        ]
        super().__init__(layers=layers)

    def initialize_for(self, model: Any, batch_size: int = 1) -> QuantizedCache:
        """Make the memory now, for `model` and so many sequences, rather than with the first tokens. Returns the cache.

        With `prefill_chunk_size`, `generate` compiles how it reads a prompt too; a graph that is to make the memory is left for
        that in every layer, which each layer then compiles by itself.
        """
        config = model.config.get_text_config(decoder=True)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.early_initialization(batch_size, heads, dim, model.dtype, model.device)
        return self

    @property
    def nbytes_packed(self) -> int:
        """Bytes of all keys and values, once they are there."""
        own = [e.kv for e in self.layers if isinstance(e, QuantizedLayer) and e.is_initialized]
        quantized = sum(kv.nbytes_packed for kv in own)
        plain: list[Any] = [e for e in self.layers if not isinstance(e, QuantizedLayer)]
        return quantized + sum(t.nbytes for e in plain for t in (e.keys, e.values) if t is not None)


def enable_quantized_kv_cache(
    model: Any, scheme: str | KVCacheConfig | Spec | None = None, *, k: Spec | None = None, v: Spec | None = None
) -> Any:
    """Let `model.generate(...)` use a quantized cache where it is given none. Returns the model.

    scheme, k, v: as in `QuantizedCache`; without any, generate is as it was before. The cache grows, or has a fixed length with
    `cache_implementation="static"`.

    Raises ValueError for an unknown scheme, and for an encoder-decoder model.
    """
    if scheme is None and k is None and v is None:
        model.__dict__.pop("_prepare_cache_for_generation", None)
        return model
    QuantizedCache(model.config, scheme, k=k, v=v)
    original = type(model)._prepare_cache_for_generation

    @functools.wraps(original)
    def prepare(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, max_length: int
    ) -> Any:
        kind = generation_config.cache_implementation
        given = model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False
        if given or kind not in (None, "dynamic", "static"):
            return original(self, generation_config, model_kwargs, mode, batch_size, max_length)
        if kind == "static" and generation_config.max_cache_len is not None:
            max_length = max(max_length, generation_config.max_cache_len)
        cache = QuantizedCache(self.config, scheme, max_length if kind == "static" else None, k=k, v=v)
        if kind == "static" and generation_config.prefill_chunk_size is not None:
            cache.initialize_for(
                self, batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            )
        model_kwargs["past_key_values"] = cache
        if generation_config.is_assistant:
            cache.activate_past_recording()
        return None

    model._prepare_cache_for_generation = types.MethodType(prepare, model)
    return model


@functools.cache
def _let_attention_read() -> None:
    """Give transformers' `READING` another way for a `KVCache`. It is for the first cache to ask: no import changes it."""
    original = AttentionInterface._global_mapping[READING]

    @functools.wraps(original)
    def attention(
        module: Any, query: Tensor, key: Any, value: Any, mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(key, KVCache):
            return _attention(query, key, mask, *args, **kwargs)
        return original(module, query, key, value, mask, *args, **kwargs)

    AttentionInterface.register(READING, attention)


def _attention(
    query: Tensor, kv: KVCache, mask: Tensor | None, dropout: float = 0.0, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError(
            "QuantizedCache: attention with a position bias is not there; use transformers' own caches"
        )
    out = kv.attend(query, mask, scale=scaling, softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"))
    return out.transpose(1, 2).contiguous(), None  # (B, T, heads, head_dim)

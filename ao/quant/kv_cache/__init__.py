"""Keys and values of attention, quantized as they are written and read as they are."""

from .cache import KVCache
from .config import KV_CACHES, KVCacheConfig, kv_cache_config

__all__ = ["KV_CACHES", "KVCache", "KVCacheConfig", "kv_cache_config"]

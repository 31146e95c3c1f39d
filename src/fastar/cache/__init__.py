"""What is kept of the past: one file a policy."""

from fastar.cache.base import CachePolicy, CacheSpec, CacheView, Staged
from fastar.cache.dense import DenseCache
from fastar.cache.empty import EmptyCache
from fastar.cache.head_errors import HeadErrors
from fastar.cache.headwise import HeadwiseCache
from fastar.cache.key_norm import KeyNormCache
from fastar.cache.random import RandomCache
from fastar.cache.stock import StockWindow
from fastar.cache.tempcache import TempCache
from fastar.cache.tempcache_paper import TempCachePaper
from fastar.cache.threshold_errors import ThresholdErrors
from fastar.cache.window import WindowCache

__all__ = [
    "CachePolicy",
    "CacheSpec",
    "CacheView",
    "DenseCache",
    "EmptyCache",
    "HeadErrors",
    "HeadwiseCache",
    "KeyNormCache",
    "RandomCache",
    "Staged",
    "StockWindow",
    "TempCache",
    "TempCachePaper",
    "ThresholdErrors",
    "WindowCache",
]

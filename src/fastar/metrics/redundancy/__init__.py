"""How redundant the past is: of keys, values, queries and attention, on any backbone and any method."""

from fastar.metrics.redundancy.bound import BoundProbe
from fastar.metrics.redundancy.correspondence import CorrespondenceAccuracy
from fastar.metrics.redundancy.drift import Drift
from fastar.metrics.redundancy.keys import KeySimilarity
from fastar.metrics.redundancy.lags import AttentionByLag
from fastar.metrics.redundancy.prompt import PromptMass
from fastar.metrics.redundancy.rank import EffectiveRank
from fastar.metrics.redundancy.recorder import RedundancyRecorder
from fastar.metrics.redundancy.top_entries import TopEntries

__all__ = [
    "AttentionByLag",
    "BoundProbe",
    "CorrespondenceAccuracy",
    "Drift",
    "EffectiveRank",
    "KeySimilarity",
    "PromptMass",
    "RedundancyRecorder",
    "TopEntries",
]

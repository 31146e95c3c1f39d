"""Nearest neighbours: exact, LSH, quantised and FAISS matching, and content buckets, behind two interfaces.

The `Triton...` matchers are the fast forms for the GPU; the others run anywhere and define the answers.
"""

from fastar.ann.base import Bucketizer, Excluded, Matcher, Metric
from fastar.ann.bucketizers import KMeansBucketizer, RandomBucketizer
from fastar.ann.exact import ExactMatcher
from fastar.ann.faiss import FaissMatcher
from fastar.ann.fused import TritonBinaryMatcher, TritonLSHMatcher, TritonMatcher, TritonQuantizedMatcher
from fastar.ann.lsh import LSHBucketizer, LSHMatcher
from fastar.ann.quantized import QuantizedBucketizer, QuantizedMatcher
from fastar.ann.recall import recall_at_1
from fastar.ann.similarity import SIMILARITIES, Similarity, key_features, squared_distance

__all__ = [
    "SIMILARITIES",
    "Bucketizer",
    "ExactMatcher",
    "Excluded",
    "FaissMatcher",
    "KMeansBucketizer",
    "LSHBucketizer",
    "LSHMatcher",
    "Matcher",
    "Metric",
    "QuantizedBucketizer",
    "QuantizedMatcher",
    "RandomBucketizer",
    "Similarity",
    "TritonBinaryMatcher",
    "TritonLSHMatcher",
    "TritonMatcher",
    "TritonQuantizedMatcher",
    "key_features",
    "recall_at_1",
    "squared_distance",
]

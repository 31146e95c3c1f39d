"""Nearest neighbours: exact, LSH, quantised and FAISS matching, and content buckets, behind two interfaces."""

from fastar.ann.base import Bucketizer, Matcher, Metric
from fastar.ann.bucketizers import KMeansBucketizer, RandomBucketizer
from fastar.ann.exact import ExactMatcher
from fastar.ann.faiss import FaissMatcher
from fastar.ann.lsh import LSHBucketizer, LSHMatcher
from fastar.ann.quantized import QuantizedBucketizer, QuantizedMatcher
from fastar.ann.similarity import SIMILARITIES, Similarity, key_features, squared_distance

__all__ = [
    "SIMILARITIES",
    "Bucketizer",
    "ExactMatcher",
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
    "key_features",
    "squared_distance",
]

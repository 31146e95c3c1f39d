"""The metrics a run may log: unit, better direction, meaning. One vocabulary for store, tables and plots."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricInfo:
    """Unit ("" for a pure number), better direction ("" if neither), decimals in tables, meaning."""

    unit: str
    better: Literal["higher", "lower", ""]
    decimals: int
    meaning: str


METRICS: dict[str, MetricInfo] = {
    # fidelity: the same seed against dense, or against the truth
    "psnr": MetricInfo("dB", "higher", 2, "peak signal-to-noise ratio to the reference, mean over frames"),
    "ssim": MetricInfo("", "higher", 4, "structural similarity to the reference, mean over frames"),
    "vmaf": MetricInfo("", "higher", 1, "VMAF (0-100) to the reference, mean over frames"),
    "latent_error": MetricInfo(
        "", "lower", 3, "relative error of the latents, norm over a chunk, to the reference"
    ),
    "revisit_psnr": MetricInfo(
        "dB", "higher", 2, "PSNR to the simulator's truth on returning pixels, pooled per clip"
    ),
    "frechet": MetricInfo("", "lower", 2, "Frechet distance of image features, generated to real"),
    "turn_agreement": MetricInfo("", "higher", 3, "share of turns whose optical flow has the right sign"),
    "presence": MetricInfo("", "higher", 3, "share of the scripted things that are found in their places"),
    # a video by itself (fastar/metrics/quality): stand-ins for dimensions of VBench, and VBench
    "dynamic_degree_lite": MetricInfo("", "", 3, "share of pairs of frames between which something moves"),
    "subject_consistency_lite": MetricInfo(
        "", "higher", 4, "cosine of EfficientNet features to first and previous frame"
    ),
    "background_consistency_lite": MetricInfo(
        "", "higher", 4, "the same of the average of its middle map: textures and colours"
    ),
    "temporal_flickering_lite": MetricInfo(
        "", "higher", 4, "1 - mean absolute difference of consecutive frames"
    ),
    "motion_smoothness_lite": MetricInfo(
        "", "higher", 4, "1 - mean absolute error of frames interpolated by optical flow"
    ),
    "imaging_quality_lite": MetricInfo(
        "", "higher", 1, "100 - BRISQUE, mean over frames; for photographic videos"
    ),
    "vbench": MetricInfo("", "higher", 4, "VBench's own score, of the dimension named after the slash"),
    "vbench_video": MetricInfo("", "higher", 4, "the same of one video, before VBench scales it"),
    # attention
    "recall": MetricInfo("", "higher", 4, "sum of min(dense, method) attention per token, mean over queries"),
    "output_error": MetricInfo("", "lower", 4, "relative error of the attention output"),
    "density": MetricInfo("", "lower", 4, "executed query-key pairs / pairs of unbounded dense, same chunk"),
    "block_fill": MetricInfo("", "higher", 3, "same-bucket pairs / executed pairs with cached keys"),
    "slot_share": MetricInfo("", "lower", 4, "cache slots / slots of unbounded dense"),
    "byte_share": MetricInfo("", "lower", 4, "cache bytes / bytes of an unbounded dense bfloat16 cache"),
    # the prompt (fastar/metrics/prompt_tokens.py); padding never counts but in the density
    "prompt_share": MetricInfo(
        "", "lower", 3, "prompt tokens read / tokens of the prompt, mean of sparse calls"
    ),
    "prompt_share_any": MetricInfo("", "lower", 3, "the same, of tokens that any head of any layer reads"),
    "prompt_recall": MetricInfo("", "higher", 3, "prompt tokens read / those that matter to the chunk"),
    "prompt_recall_any": MetricInfo("", "higher", 3, "the same, of tokens that any head of any layer reads"),
    "prompt_precision": MetricInfo("", "higher", 3, "prompt tokens read that matter / tokens read"),
    "prompt_mass": MetricInfo(
        "", "higher", 3, "dense attention to the tokens read / to all tokens of the prompt"
    ),
    "prompt_density": MetricInfo(
        "", "lower", 3, "pairs of queries and prompt tokens, padding included / those of dense, all passes"
    ),
    # redundancy (fastar/metrics/redundancy, experiments/redundancy.py); names go on with qualifiers, /layer=3
    "key_cosine": MetricInfo("", "", 3, "cosine of a new key to a cached one, mean over heads"),
    "key_cosine_head": MetricInfo("", "", 3, "the same by head, nearest keys"),
    "key_cosine_at": MetricInfo("", "", 3, "the same to the nearest key among those of a lag in frames"),
    "key_above": MetricInfo(
        "", "", 3, "share of new keys whose cosine to a cached one is at least threshold"
    ),
    "key_identical": MetricInfo(
        "", "", 4, "share of new keys that equal a cached one up to bfloat16 rounding"
    ),
    "key_logit_change": MetricInfo("", "lower", 3, "E_q[(q . dk)^2] / D of a merge of the two keys"),
    "key_value_change": MetricInfo("", "lower", 3, "relative distance of the values that go with two keys"),
    "query_drift": MetricInfo(
        "", "", 3, "cosine of a token's queries in consecutive chunks, steps or layers"
    ),
    "value_drift": MetricInfo("", "", 3, "cosine of a place's values in consecutive chunks"),
    "top_recall": MetricInfo(
        "", "higher", 3, "share of the method's attention in its largest entries, at a density"
    ),
    "top_recall_std": MetricInfo("", "", 3, "standard deviation of top_recall over the heads of a layer"),
    "top_error": MetricInfo("", "lower", 3, "relative error of the output that these entries give"),
    "lag_share": MetricInfo("", "", 3, "share of attention, or of keys, at a lag in frames"),
    "effective_rank": MetricInfo(
        "", "", 1, "exp of the entropy of a cache's singular values, mean over heads"
    ),
    "correspondence": MetricInfo("", "higher", 3, "share of matched keys that show the token's own point"),
    "correspondence_head": MetricInfo("", "higher", 3, "the same by head, in the frame before"),
    "error_bound": MetricInfo("", "", 3, "bound on output_error from key distances, mean over heads"),
    "error_bound_worst": MetricInfo("", "", 3, "the same from the largest distance alone"),
    "error_first_order": MetricInfo("", "", 3, "first-order estimate of output_error without cancellation"),
    "prompt_padding_mass": MetricInfo("", "", 3, "attention to the padding of a prompt"),
    "prompt_padding_share": MetricInfo("", "", 3, "padding / tokens of the padded prompt"),
    "prompt_entropy": MetricInfo("nat", "", 3, "entropy of attention to the prompt's own tokens"),
    "prompt_effective": MetricInfo("", "", 1, "effective number of prompt tokens, exp(entropy)"),
    "prompt_effective_share": MetricInfo("", "", 3, "the same / tokens of the prompt"),
    "prompt_effective_padded": MetricInfo("", "", 1, "effective number of tokens, padding included"),
    "pca": MetricInfo("", "", 3, "coordinate along a principal component, the largest is 1"),
    "pca_variance": MetricInfo("", "", 3, "share of the variance along a principal component"),
    # memory
    "cache_bytes": MetricInfo(
        "B", "lower", 1, "everything the cache keeps: keys, values, scales, counts, positions"
    ),
    "cache_slots": MetricInfo("", "lower", 0, "slots the cache uses, per head"),
    "peak_allocated": MetricInfo(
        "B", "lower", 1, "peak memory: allocated on the GPU, or resident set of the process"
    ),
    "peak_chunk": MetricInfo("B", "lower", 1, "as peak_allocated, of one chunk"),
    "peak_reserved": MetricInfo("B", "lower", 1, "peak memory the GPU allocator reserved"),
    # speed
    "prefill_s": MetricInfo("s", "lower", 2, "time of pushing the true history through the commit pass"),
    "denoise_s": MetricInfo("s", "lower", 4, "time of a chunk's denoise passes"),
    "commit_s": MetricInfo("s", "lower", 4, "time of a chunk's commit pass"),
    "decode_s": MetricInfo("s", "lower", 4, "time of decoding a chunk"),
    "chunk_s": MetricInfo("s", "lower", 4, "wall time of a chunk, end to end"),
    "fps_denoise": MetricInfo("1/s", "higher", 2, "video frames per second, denoise passes only"),
    "fps_commit": MetricInfo("1/s", "higher", 2, "video frames per second, denoise + commit"),
    "fps_decode": MetricInfo("1/s", "higher", 2, "video frames per second, denoise + commit + decode"),
    "fps": MetricInfo("1/s", "higher", 2, "video frames per second, end to end"),
    "fps_chunk": MetricInfo("1/s", "higher", 2, "video frames per second of one chunk, end to end"),
    "speedup": MetricInfo(
        "",
        "higher",
        2,
        "times as fast as the method named after the slash, same seeds and machine, end to end",
    ),
    "latency_p50": MetricInfo("s", "lower", 4, "median wall time of a chunk"),
    "latency_p99": MetricInfo("s", "lower", 4, "99th percentile of a chunk's wall time"),
}


def unit_of(metric: str) -> str:
    """Unit of a metric; "" if the name is not in `METRICS`. `name/qualifier` has the unit of `name`."""
    info = METRICS.get(metric.split("/")[0])
    return info.unit if info else ""


def is_timing(metric: str) -> bool:
    """Whether clocks measured it: what else ran on the machine shows in it."""
    return unit_of(metric) in ("s", "1/s") or metric.split("/")[0] == "speedup"


def is_held(metric: str) -> bool:
    """Whether it tells what a cache holds after a chunk: the last chunk's value is that of the rollout."""
    return metric in ("cache_bytes", "cache_slots", "byte_share", "slot_share")


def decimals_of(metric: str) -> int:
    """Decimals to print; 3 for an unknown name."""
    info = METRICS.get(metric.split("/")[0])
    return info.decimals if info else 3


def shown_as(metric: str) -> tuple[float, str]:
    """Divisor and unit for people: bytes are stored as bytes and shown as MiB."""
    unit = unit_of(metric)
    return (2.0**20, "MiB") if unit == "B" else (1.0, unit)

"""Quality of a video by itself, without a reference: stand-ins for dimensions of VBench whose weights are no download.

Every name ends in `_lite`, and none of the numbers may be called VBench's or held against them: VBench itself runs in
an environment of its own (`fastar.metrics.quality.vbench`). They tell methods apart on the same seeds.

| here | VBench (Huang et al. 2024) has | in its place |
|---|---|---|
| subject_consistency_lite | DINO ViT-B/16 | EfficientNet-Lite0, last features |
| background_consistency_lite | CLIP ViT-B/32 | EfficientNet-Lite0, pooled 14 x 14 map |
| temporal_flickering_lite | static videos only | all videos, the same formula |
| motion_smoothness_lite | AMT-S | mid-frames warped by DIS flow |
| dynamic_degree_lite | RAFT, yes or no a video | DIS, share of the pairs of frames |
| imaging_quality_lite | MUSIQ | 100 - BRISQUE |

Overall consistency has no stand-in but where scripts say what is to be seen: `presence`. Aesthetic quality has none.
A frozen video is perfect in the first four: never read them without dynamic_degree_lite. None of them knows what
should have been seen: a world model that forgets everything may draw a duller, steadier world than one that remembers,
and score higher. The imaging quality is for photographic videos only (conf/metrics/quality_photos.yaml).
"""

from fastar.metrics.quality.base import Scores, VideoScore, check_measures, quality_rows
from fastar.metrics.quality.consistency import BackgroundConsistency, SubjectConsistency
from fastar.metrics.quality.imaging import ImagingQuality
from fastar.metrics.quality.motion import DynamicDegree, MotionSmoothness, TemporalFlickering

LITE = (
    "dynamic_degree_lite", "subject_consistency_lite", "background_consistency_lite", "temporal_flickering_lite",
    "motion_smoothness_lite", "imaging_quality_lite",
)  # fmt: skip
"""In the order of tables: how much moves comes first, since the rest cannot be read without it."""

__all__ = [
    "LITE",
    "BackgroundConsistency",
    "DynamicDegree",
    "ImagingQuality",
    "MotionSmoothness",
    "Scores",
    "SubjectConsistency",
    "TemporalFlickering",
    "VideoScore",
    "check_measures",
    "quality_rows",
]

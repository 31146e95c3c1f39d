"""VBench's dimensions and how they become its quality, semantic and total score (Huang et al. 2024).

Weights and ranges are those of scripts/constant.py, the formula that of scripts/cal_final_score.py, in Vchitect/VBench.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Dimension:
    """Of VBench.

    Attributes:
        part: of the total that it counts in.
        low, high: scores that count as 0 and 1.
        weight: in its part.
        custom: whether videos of any prompt can be scored; of the others VBench has to know what is to be seen.
        reads: whether it needs the prompt of each video.
        weights: files below VBench's cache folder that it loads.
    """

    part: Literal["quality", "semantic"]
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    custom: bool = False
    reads: bool = True
    weights: tuple[str, ...] = ()


_CLIP_B, _CLIP_L = "clip_model/ViT-B-32.pt", "clip_model/ViT-L-14.pt"
_DINO = ("dino_model/dino_vitbase16_pretrain.pth", "dino_model/facebookresearch_dino_main")
_GRIT = ("grit_model/grit_b_densecap_objectdet.pth",)
_VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz")

DIMENSIONS: Mapping[str, Dimension] = {
    "subject_consistency": Dimension("quality", 0.1462, weights=_DINO, custom=True, reads=False),
    "background_consistency": Dimension("quality", 0.2615, weights=(_CLIP_B,), custom=True, reads=False),
    "temporal_flickering": Dimension("quality", 0.6293, custom=True, reads=False),
    "motion_smoothness": Dimension(
        "quality", 0.706, 0.9975, weights=("amt_model/amt-s.pth",), custom=True, reads=False
    ),
    "dynamic_degree": Dimension(
        "quality", weight=0.5, weights=("raft_model/models/raft-things.pth",), custom=True, reads=False
    ),
    "aesthetic_quality": Dimension(
        "quality",
        weights=(_CLIP_L, "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
        custom=True,
        reads=False,
    ),
    "imaging_quality": Dimension(
        "quality", weights=("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",), custom=True, reads=False
    ),
    "object_class": Dimension("semantic", weights=_GRIT),
    "multiple_objects": Dimension("semantic", weights=_GRIT),
    "human_action": Dimension(
        "semantic", weights=("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",), custom=True
    ),
    "color": Dimension("semantic", weights=_GRIT),
    "spatial_relationship": Dimension("semantic", weights=_GRIT),
    "scene": Dimension("semantic", 0.0, 0.8222, weights=("caption_model/tag2text_swin_14m.pth",)),
    "appearance_style": Dimension("semantic", 0.0009, 0.2855, weights=(_CLIP_B,)),
    "temporal_style": Dimension("semantic", 0.0, 0.364, weights=_VICLIP, custom=True),
    "overall_consistency": Dimension("semantic", 0.0, 0.364, weights=_VICLIP, custom=True),
}

QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1


def final_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """The scores `quality`, `semantic` and `total` that can be made from those of dimensions.

    A part is the weighted mean of its dimensions, each scaled so that its range becomes 0 to 1; the total is
    (4 quality + semantic) / 5. VBench's script counts a dimension that is missing as 0; here a part that lacks one is
    left out, and so is the total without both.

    Raises:
        ValueError: a dimension that VBench does not have.
    """
    unknown = sorted(scores.keys() - DIMENSIONS.keys())
    if unknown:
        raise ValueError(f"VBench has no dimension {unknown[0]}: it has {', '.join(DIMENSIONS)}")
    found: dict[str, float] = {}
    for part in ("quality", "semantic"):
        members = {name: dimension for name, dimension in DIMENSIONS.items() if dimension.part == part}
        if members.keys() <= scores.keys():
            scaled = sum(
                one.weight * (scores[name] - one.low) / (one.high - one.low) for name, one in members.items()
            )
            found[part] = scaled / sum(one.weight for one in members.values())
    if len(found) == 2:
        weighted = QUALITY_WEIGHT * found["quality"] + SEMANTIC_WEIGHT * found["semantic"]
        found["total"] = weighted / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return found

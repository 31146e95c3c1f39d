"""Scripted scenes: videos of several shots with long prompts, and the truth about which words matter to which frame."""

from fastar.data.scenes.dataset import NUM_ACTIONS, ScenesClips
from fastar.data.scenes.detector import detect, presence
from fastar.data.scenes.prompt import write_prompt
from fastar.data.scenes.reading import read_shot
from fastar.data.scenes.render import render, truth
from fastar.data.scenes.script import Actor, Background, Script, Shot, draw_script
from fastar.data.scenes.truth import regions, relevance

__all__ = [
    "NUM_ACTIONS",
    "Actor",
    "Background",
    "ScenesClips",
    "Script",
    "Shot",
    "detect",
    "draw_script",
    "presence",
    "read_shot",
    "regions",
    "relevance",
    "render",
    "truth",
    "write_prompt",
]

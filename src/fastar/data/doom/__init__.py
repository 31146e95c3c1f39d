"""Doom worlds through ViZDoom: fresh mazes, an exact camera, clips with returns, the truth about revisits."""

from fastar.data.doom.camera import NUM_ACTIONS, Action, Pose, expected_flow_sign, move, trajectory
from fastar.data.doom.dataset import DoomClips
from fastar.data.doom.env import DoomWorlds
from fastar.data.doom.maps import World, make_world
from fastar.data.doom.policy import scripted
from fastar.data.doom.returns import ReturnClips

__all__ = [
    "NUM_ACTIONS",
    "Action",
    "DoomClips",
    "DoomWorlds",
    "Pose",
    "ReturnClips",
    "World",
    "expected_flow_sign",
    "make_world",
    "move",
    "scripted",
    "trajectory",
]

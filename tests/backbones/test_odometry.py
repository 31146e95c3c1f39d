"""Dead reckoning: exact circles, the simulator's own kinematics, rays that meet the same things."""

import math

import pytest
import torch
from hydra import compose, initialize_config_dir

from fastar.attention.rope import grid_positions
from fastar.backbones import CausalWanTransformer, WanConfig, build_backbone, load_backbone, save_backbone
from fastar.backbones.odometry import Odometer
from fastar.backbones.reference import FullAttend

MOTIONS = [(0, 0), (1, 0), (-1, 0), (0, 7.5), (0, -7.5)]
FORWARD, BACK, LEFT, RIGHT = 1, 2, 3, 4


def actions(*names: int) -> torch.Tensor:
    return torch.tensor([names])


def test_a_full_circle_and_a_walk_back_end_where_they_began() -> None:
    odometer = Odometer(MOTIONS)
    way = actions(*[LEFT] * 48, *[FORWARD] * 5, *[RIGHT] * 7, *[LEFT] * 7, *[BACK] * 5)
    poses = odometer.advance(odometer.start(1, "cpu"), way)
    start, end = odometer.features(odometer.start(1, "cpu"), 8), odometer.features(poses[:, -1], 8)
    assert torch.allclose(start, end, atol=1e-6)
    assert not torch.allclose(start, odometer.features(poses[:, 23], 8), atol=0.1)


def test_features_tell_neighbouring_headings_apart_by_their_highest_harmonic() -> None:
    for harmonics in ((1, 2, 4), (1, 2, 4, 8, 16)):
        odometer = Odometer(MOTIONS, harmonics, (4, 8))
        poses = odometer.advance(odometer.start(1, "cpu"), actions(LEFT, LEFT))
        features = odometer.features(poses, 1)[0, :, 0]
        assert (
            features.shape == (2, odometer.num_features) and odometer.num_features == 2 * len(harmonics) + 8
        )
        heading = features.view(2, 2, -1)[:, :, : len(harmonics)]  # cosines, sines
        alike = (heading[0] * heading[1]).sum(0)[-1]
        assert alike == pytest.approx(math.cos(math.radians(7.5 * harmonics[-1])), abs=1e-5)


def test_a_wall_keeps_its_ray_when_the_camera_turns() -> None:
    """90 degrees through four columns: turning by 45 degrees moves the left edge of the picture to its middle."""
    odometer = Odometer([(0, 0), (0, 45)], (1, 2), (4,))
    edges = odometer.features(odometer.start(1, "cpu"), 4)[0]
    assert edges.shape == (4, odometer.num_features)
    azimuth = torch.atan2(edges[:, 4], edges[:, 0]).rad2deg()  # sine and cosine of the first harmonic
    assert azimuth.tolist() == pytest.approx([36.87, 14.04, -14.04, -36.87], abs=0.01)
    ahead = odometer.features(odometer.advance(odometer.start(1, "cpu"), actions(1)), 1)[0, 0, 0]
    left = odometer.features(odometer.start(1, "cpu"), 100_000)[0, 0]
    assert torch.allclose(ahead, left, atol=1e-4)


def test_no_camera_sees_half_a_circle() -> None:
    with pytest.raises(ValueError, match="field_of_view must lie between 0 and 180 degrees, got 180"):
        Odometer(MOTIONS, field_of_view=180)


def test_a_fresh_query_finds_the_keys_of_its_own_ray() -> None:
    """Before any training, whatever the content: a frame of the same pose, 100 frames ago, beats frames of other poses.

    Rays that are merely heard (added to tokens, say) are noise at first, and training silences them.
    """
    torch.manual_seed(0)
    sizes = {
        "dim": 128,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_dim": 96,
        "in_channels": 16,
        "out_channels": 16,
    }
    net = CausalWanTransformer(WanConfig(**sizes, num_actions=5, action_motions=tuple(MOTIONS)))
    logits: list[torch.Tensor] = []
    now, past = grid_positions(100, 1, (2, 2)), grid_positions(0, 1, (2, 2)).repeat(64, 1)

    def attend(stream, layer, q, k, v):
        q, k = net.rope.rotate(q[:, :, :4], now), net.rope.rotate(k[:, :, 4:], past)
        # tokens of equal place, all clips and heads
        logits.append((q.unsqueeze(2) * k.unflatten(2, (64, 4))).sum(-1).mean(dim=(0, 1, 3)))
        return v

    poses = net.odometer.random_start(65, "cpu").repeat(16, 1, 1)
    poses[:, 1] = poses[:, 0]  # frame 1 stands where frame 0 does
    with torch.no_grad():
        net(
            torch.randn(16, 65, 16, 4, 4),
            torch.zeros(16, 65),
            attend=attend,
            actions=torch.zeros(16, 65, dtype=torch.long),
            poses=poses,
        )
    for same, *others in (layer.tolist() for layer in logits):
        assert same > max(others)


def test_a_turn_comes_before_its_step() -> None:
    odometer = Odometer([(1, 90)])
    x, y, heading = odometer.advance(odometer.start(1, "cpu"), actions(0))[0, 0].tolist()
    assert (x, y, heading) == pytest.approx((0, 1, math.pi / 2))


def test_chunk_by_chunk_equals_all_at_once() -> None:
    odometer, way = Odometer(MOTIONS), torch.randint(5, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = odometer.advance(odometer.start(2, "cpu"), way)
    pose, parts = odometer.start(2, "cpu"), []
    for chunk in way.split(4, dim=1):
        parts.append(odometer.advance(pose, chunk))
        pose = parts[-1][:, -1]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-12)


def test_the_doom_config_moves_as_the_simulator_does(repository) -> None:
    camera = pytest.importorskip("fastar.data.doom.camera", reason="the simulator's code needs fastar[doom]")
    with initialize_config_dir(str(repository / "conf"), version_base=None):
        transformer = compose("train").backbone.transformer
    odometer = Odometer(
        [tuple(motion) for motion in transformer.action_motions], field_of_view=transformer.field_of_view
    )
    raycast = pytest.importorskip("fastar.data.doom.raycast")
    assert odometer.half_width == pytest.approx(camera.WIDTH / 2 / raycast.FOCAL_X)

    class OpenPlain:
        def is_free(self, x: float, y: float) -> bool:
            return True

    way = torch.randint(len(camera.Action), (1, 60), generator=torch.Generator().manual_seed(1))
    way[0, 0] = camera.Action.NONE
    truth = camera.trajectory(OpenPlain(), camera.Pose(0, 0, 0), way[0].tolist())
    poses = odometer.advance(odometer.start(1, "cpu"), way)[0]
    for pose, (x, y, heading) in zip(truth, poses.tolist(), strict=True):
        assert (
            math.dist((pose.x / camera.STEP, pose.y / camera.STEP), (x, y)) < 1.0
        )  # the simulator rounds steps
        assert math.cos(math.radians(pose.degrees) - heading) == pytest.approx(1)


def test_the_transformer_asks_for_poses_exactly_when_it_has_an_odometer() -> None:
    sizes = {"dim": 24, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "in_channels": 4, "out_channels": 4}
    plain = CausalWanTransformer(WanConfig(**sizes, num_actions=5))
    counting = CausalWanTransformer(WanConfig(**sizes, num_actions=5, action_motions=tuple(MOTIONS)))
    latents, timesteps, acted = (
        torch.randn(1, 2, 4, 4, 4),
        torch.zeros(1, 2),
        torch.zeros(1, 2, dtype=torch.long),
    )
    attend = FullAttend(rope=plain.rope, grid=(2, 2))
    poses = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="exactly when the backbone has an odometer"):
        plain(latents, timesteps, attend=attend, actions=acted, poses=poses)
    with pytest.raises(ValueError, match="exactly when the backbone has an odometer"):
        counting(latents, timesteps, attend=attend, actions=acted)
    with pytest.raises(ValueError, match="one row of three per frame"):
        counting(latents, timesteps, attend=attend, actions=acted, poses=poses[:, :1])


def test_a_backbone_from_a_checkpoint_counts_as_the_one_that_was_saved(tmp_path) -> None:
    sizes = {"dim": 24, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "in_channels": 4, "out_channels": 4}
    fresh = build_backbone(
        name="counting",
        transformer=WanConfig(**sizes, num_actions=5, action_motions=tuple(MOTIONS)),
        autoencoder=None,
        frame_size=(32, 32),
        chunk_frames=2,
        context_frames=8,
    )
    save_backbone(tmp_path, fresh)
    loaded = load_backbone(tmp_path).transformer  # built on the meta device, then filled
    way = actions(FORWARD, LEFT, FORWARD)
    poses = [net.odometer.advance(net.odometer.start(1, "cpu"), way) for net in (fresh.transformer, loaded)]
    assert torch.equal(*poses)


def test_one_motion_for_each_action() -> None:
    with pytest.raises(ValueError, match="one pair for each of the 4 actions, got 5"):
        WanConfig(dim=24, num_layers=1, num_heads=2, ffn_dim=24, num_actions=4, action_motions=tuple(MOTIONS))

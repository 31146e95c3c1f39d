"""Noise schedules of flow-matching samplers, as in Wan: v = noise - x0, x_t = (1 - sigma) x0 + sigma noise."""

from collections.abc import Sequence

TABLE = 1000  # training timesteps of Wan's scheduler


def shifted_sigma(u: float, shift: float) -> float:
    """sigma = s u / (1 + (s - 1) u) for u in [0, 1], in a form that gives exactly 1 for u = 1."""
    return shift * u / ((1 - u) + shift * u)


def uniform_timesteps(num_steps: int, *, shift: float = 1.0) -> tuple[float, ...]:
    """Timesteps (0..1000, falling) of `num_steps` Euler steps from pure noise, u spaced evenly from 1 to 1/num_steps.

    Raises:
        ValueError: fewer than one step, or a shift that is not positive.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"a schedule needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}")
    return tuple(TABLE * shifted_sigma(1 - i / num_steps, shift) for i in range(num_steps))


def warped_timesteps(steps: Sequence[int], *, shift: float = 5.0) -> tuple[float, ...]:
    """Self-Forcing's `warp_denoising_step`: the listed integer n selects u = n / 1000 of the shifted table.

    [1000, 750, 500, 250] with shift 5 gives 1000, 937.5, 833.33, 625.

    Raises:
        ValueError: steps that do not fall, or lie outside 1..1000.
    """
    if not steps or any(not 0 < n <= TABLE for n in steps) or list(steps) != sorted(set(steps), reverse=True):
        raise ValueError(f"denoising steps must fall strictly within 1..{TABLE}, got {list(steps)}")
    return tuple(TABLE * shifted_sigma(n / TABLE, shift) for n in steps)

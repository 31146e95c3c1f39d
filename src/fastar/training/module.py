"""What the training stages share: two optimisers with one learning rate, a time limit, resume.

A stage that is limited by steps alone ends with the same weights, bit for bit, whether it was interrupted or not, on
one device, thread count and number of processes: what a step draws at random depends on the seed, the step and the rank
alone. Under a time limit its length and its learning rates depend on how fast it goes: no two runs are the same.
"""

from abc import abstractmethod
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from fastar.training.optim import Progress, build_optimizers, set_learning_rate

SYNC_EVERY = 10  # steps between two readings of rank 0's clock


class TimedModule(lightning.LightningModule):
    """A LightningModule whose learning rate follows the share of the run that is done.

    Args:
        learning_rate, weight_decay, optimizer, matrix_scale: see `fastar.training.optim.build_optimizers`.
        max_steps, max_minutes, warmup_steps, decay_share: see `fastar.training.optim.Progress`.
        gradient_clip: largest global gradient norm.
        seed: of all that is drawn while training.
    """

    def __init__(
        self,
        *,
        learning_rate: float,
        weight_decay: float,
        optimizer: str,
        max_steps: int,
        max_minutes: float | None,
        warmup_steps: int,
        decay_share: float,
        gradient_clip: float,
        matrix_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # two optimisers, one backward
        self.learning_rate, self.weight_decay, self.optimizer = learning_rate, weight_decay, optimizer
        self.gradient_clip, self.matrix_scale = gradient_clip, matrix_scale
        self.progress = Progress(
            max_steps=max_steps, max_minutes=max_minutes, warmup_steps=warmup_steps, decay_share=decay_share
        )
        self.seed = seed
        self.steps_done = 0
        self.clips_done = 0  # in all processes together
        self.share_done = 0.0

    @abstractmethod
    def compute_loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch by name; `loss` is the one that is minimised."""

    def draw_for_all(self) -> float:
        """Uniform in [0, 1), new in every step, the same in all processes: for what decides how long a step takes."""
        return float(np.random.default_rng([self.seed, self.steps_done]).random())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return build_optimizers(
            self,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            kind=self.optimizer,
            matrix_scale=self.matrix_scale,
        )

    def on_train_start(self) -> None:
        self.progress.start()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        counted = self.optimizers()
        first = counted[0] if isinstance(counted, list) else counted
        optimizers = self.trainer.optimizers
        if (
            self.steps_done % SYNC_EVERY == 0
        ):  # all ranks follow rank 0's clock, or their learning rates would part
            self.share_done = self.trainer.strategy.broadcast(self.progress.done(self.steps_done))
        rate = self.learning_rate * self.progress.scale(self.steps_done, self.share_done)
        set_learning_rate(optimizers, rate)

        # each step draws from its own stream, so that a resumed run draws what it would have drawn
        stream = np.random.SeedSequence([self.seed, self.steps_done, self.global_rank])
        torch.manual_seed(int(stream.generate_state(1, np.uint64)[0]))
        losses = self.compute_loss(batch)
        self.manual_backward(losses["loss"])
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.gradient_clip)
        first.step()  # Lightning counts global steps by its wrapper: only one of the optimisers may count
        for optimizer in optimizers[1:]:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)

        self.steps_done += 1
        self.clips_done += len(batch["frames"]) * self.trainer.world_size
        self.log_dict(losses | {"gradient_norm": norm, "learning_rate": rate})
        if self.share_done >= 1.0:
            self.trainer.should_stop = True
        return losses["loss"].detach()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = {
            "elapsed": self.progress.elapsed,
            "steps": self.steps_done,
            "clips": self.clips_done,
            "share_done": self.share_done,  # the clock is read again only some steps later
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.progress.elapsed_before = checkpoint["progress"]["elapsed"]
        self.steps_done = checkpoint["progress"]["steps"]
        self.clips_done = checkpoint["progress"]["clips"]
        self.share_done = checkpoint["progress"]["share_done"]

"""One pass of a rollout: what the backbone is told in it beside its frames, run as it is or by a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastar.attention.context import PassContext
from fastar.attention.state import AttentionState
from fastar.backbones.conditions import ImageCondition, check_image
from fastar.backbones.prompts import Prompts
from fastar.backbones.wan.transformer import CausalWanTransformer, ProjectedTokens
from fastar.rollout.capture import CapturedPasses, RequireFinite
from fastar.rollout.guidance import guidance_of


class ConditionedPasses:
    """Runs the passes of a batch of videos, all told the same prompts, negative prompt and image.

    Args:
        transformer, state: of the rollout.
        videos: of the batch.
        latent_shape: (channels, height, width) of a latent frame.
        prompts, negative, image, capture: as `fastar.rollout.rollout.Rollout` takes them.
        guidance: scale of the loop; None for no guidance.

    Raises:
        ValueError: prompts or an image are missing, not asked for, or not one of the right sizes for each video; or
            something that graphs cannot do.
    """

    def __init__(
        self,
        transformer: CausalWanTransformer,
        state: AttentionState,
        *,
        videos: int,
        latent_shape: tuple[int, ...],
        prompts: Prompts | None,
        negative: Prompts | None,
        image: ImageCondition | None,
        guidance: float | None,
        capture: bool,
    ) -> None:
        self.transformer, self.state, self.videos = transformer, state, videos
        self.device = next(transformer.parameters()).device
        check_image(image, transformer.config, videos, latent_shape)
        self.image = image
        self._picture: ProjectedTokens | None = None
        self.captured = CapturedPasses(transformer, state) if capture else None
        self.guidance = guidance_of(guidance, negative, width=transformer.config.text_dim, videos=videos)
        self.use_prompts(prompts)

    def use_prompts(self, prompts: Prompts | None) -> None:
        """Show `prompts` from the next pass on; see the class for what is refused."""
        self.check_prompts(prompts)
        self.prompts = prompts
        dtype = self.transformer.patch_embedding.weight.dtype
        self._text = None if prompts is None else prompts.text(self.device, dtype)
        if self._text is not None and self.guidance is not None:
            self._text = self.guidance.texts(self._text)
        self._projected: ProjectedTokens | None = None
        self.state.prompt_changed()
        if self.captured is not None:
            self.captured.clear()

    def check_prompts(self, prompts: Prompts | None) -> None:
        """Raise a ValueError unless these `prompts` can be used; nothing changes."""
        width = self.transformer.config.text_dim
        if width is None and prompts is not None:
            raise ValueError("this backbone reads no text: leave its prompts out")
        if width is not None and prompts is None:
            raise ValueError(
                f"this backbone reads text and none was given: pass prompts of {self.videos} videos, {width} wide"
            )
        shape = (self.videos, width)
        if prompts is not None and (prompts.embeddings.shape[0], prompts.embeddings.shape[2]) != shape:
            raise ValueError(
                f"prompts must be [{shape[0]}, tokens, {width}], got {list(prompts.embeddings.shape)}"
            )

    def run(
        self,
        context: PassContext,
        latents: Tensor,
        require_finite: RequireFinite,
        *,
        actions: Tensor | None = None,
        poses: Tensor | None = None,
    ) -> Tensor:
        """One forward under `context`; the state commits only if its result is finite.

        Args:
            context: what the pass is.
            latents: [B, F, C, h, w].
            require_finite: looks at what is to be committed.
            actions: [B, F] int64.
            poses: [B, F, 3].

        Returns:
            velocity [B, F, C, h, w] float32; if captured, valid until the next pass.
        """
        latents = self._for_each(latents)
        if self.captured is not None:
            velocity = self.captured.run(
                context, latents, self._prompt(), require_finite,
                actions=None if actions is None else self._for_each(actions.to(self.device)),
                poses=None if poses is None else self._for_each(poses),
            )  # fmt: skip
            return velocity if self.guidance is None else self.guidance.mixed(velocity)
        timesteps = torch.tensor([context.timesteps], device=self.device, dtype=torch.float32)
        self.state.begin_pass(context)
        try:
            velocity = self.transformer(
                latents.to(self.device),
                timesteps.expand(latents.shape[0], -1),
                attend=self.state.attend,
                actions=None if actions is None else self._for_each(actions.to(self.device)),
                poses=None if poses is None else self._for_each(poses),
                text=self._prompt(),
                **self._seen(context),
            ).float()
            if context.commits:
                require_finite(torch.isfinite(velocity).all(), f"{context.kind} pass")
        except BaseException:
            self.state.abort_pass()
            raise
        self.state.end_pass()
        return velocity if self.guidance is None else self.guidance.mixed(velocity)

    def _for_each(self, told: Tensor) -> Tensor:
        """What all videos [B, ...] are told, once more for the negative prompt."""
        return told if self.guidance is None else torch.cat([told, told])

    def _prompt(self) -> ProjectedTokens | None:
        """Keys and values of the prompt in every layer, projected once."""
        if self._projected is None and self._text is not None:
            self._projected = self.transformer.project_text(self._text)
        return self._projected

    def _seen(self, context: PassContext) -> dict[str, Any]:
        """The image's keys and values, projected once, and what is known of the pass's frames."""
        if self.image is None:
            return {}
        condition = self.image.known(context.first_frame, context.num_frames).to(self.device)
        if self._picture is None:
            self._picture = self.transformer.project_image(self._for_each(self.image.tokens.to(self.device)))
        condition = self._for_each(condition)
        return {"image": self._picture, "condition": condition}

"""Classifier-free guidance (arXiv 2207.12598) on predictions. Two conventions are in use; both have a name here.

guidance_scale g (Imagen, Diffusers)    uncond + g (cond - uncond)      g = 1 is no guidance
w                (Ho & Salimans, LCM)   cond   + w (cond - uncond)      w = 0 is no guidance,  w = g - 1
"""

from __future__ import annotations

from torch import Tensor

from .prediction import Prediction
from .schedule import expand


def guide_scale(cond: Prediction, uncond: Prediction, guidance_scale: Tensor) -> Prediction:
    """uncond + g (cond - uncond) on x0 and on eps; guidance_scale [B]. This is Diffusers' `guidance_scale`."""
    return guide_w(cond, uncond, guidance_scale - 1.0)


def guide_w(cond: Prediction, uncond: Prediction, w: Tensor) -> Prediction:
    """cond + w (cond - uncond) on x0 and on eps; w [B]. The convention of LCM (arXiv 2310.04378, section 4.2)."""
    return Prediction(
        x0=cond.x0 + expand(w, cond.x0) * (cond.x0 - uncond.x0),
        eps=cond.eps + expand(w, cond.eps) * (cond.eps - uncond.eps),
    )

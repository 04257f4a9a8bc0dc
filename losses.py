"""Cross-entropy and Lovasz-softmax, "the cross-entropy and mIoU losses" of section 4.5.

Source of the second: Berman et al., The Lovasz-Softmax loss (arXiv 1705.08790) and
https://github.com/bermanmaxim/LovaszSoftmax (MIT), over the classes present and a group of images
at once, as in CDGNet and BSSGNet by the same first author. Differs from it in: absent classes and
images without a labelled pixel cost 0; no GPU synchronisation.

Letters: B batch, K classes, N pixels of a group of images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fast
from config import IGNORE


def parsing_loss(logits: Tensor, labels: Tensor, lovasz_weight: float = 1.0,
                 group: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    """CE + lovasz_weight * Lovasz of logits (B, K, H, W), labels (B, H, W); and both, detached.

    Computed on `group` consecutive images at a time and averaged over the groups: the authors' 16
    images on 4 GPUs were 4 per loss, and the gradient does not depend on how a batch is split over
    processes or accumulation steps.
    """
    groups = list(zip(logits.split(group), labels.split(group)))
    ce = torch.stack([cross_entropy(x, y) for x, y in groups]).mean()
    lovasz = torch.stack([lovasz_softmax(x, y) for x, y in groups]).mean()
    return ce + lovasz_weight * lovasz, {"ce": ce.detach(), "lovasz": lovasz.detach()}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled pixels; 0, not nan, if there are none."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


@fast.replaced_by(fast.lovasz_softmax, on=("cpu",))
def lovasz_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, K, H, W), labels (B, H, W) of any integer type -> scalar in fp32 or better.

    The cost of a class is the weighted sum of its errors, 1 - p at its pixels and p elsewhere; the
    mean is over the classes present. Ignored pixels have error 0: they sort last, where weights no
    longer matter.
    """
    probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
    probs, labels = probs.transpose(0, 1).flatten(1), labels.flatten()  # (K, N), (N,)
    truth = labels == torch.arange(len(probs), device=labels.device).unsqueeze(1)           # (K, N)
    errors = torch.where(truth, 1 - probs, probs) * (labels != IGNORE)
    costs = (errors * lovasz_weights(errors.detach(), truth)).sum(1)    # (K,)
    present = truth.any(1)
    return (costs * present).sum() / present.sum().clamp(min=1)


@fast.replaced_by(fast.lovasz_weights)
def lovasz_weights(errors: Tensor, truth: Tensor) -> Tensor:
    """errors (K, N) in [0, 1], truth (K, N) bool -> weight of each error, (K, N).

    The weights of absent classes are undefined.

    Flip the pixels of a class to wrong one by one, largest error first: a pixel's weight is the
    increase of the Jaccard loss 1 - intersection / union.
    """
    order = errors.argsort(1, descending=True)
    hit = truth.gather(1, order).to(errors.dtype)
    total = hit.sum(1, keepdim=True)
    jaccard = 1 - (total - hit.cumsum(1)) / (total + (1 - hit).cumsum(1))
    steps = torch.diff(jaccard, prepend=torch.zeros_like(total), dim=1)
    return torch.empty_like(errors).scatter_(1, order, steps)

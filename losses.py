"""Cross-entropy and Lovasz-softmax, "the cross-entropy and mIoU losses" of section 4.5.

Source of the second: Berman et al., The Lovasz-Softmax loss (arXiv 1705.08790) and
https://github.com/bermanmaxim/LovaszSoftmax (MIT), over the classes present and a group of images at once, as in CDGNet
and BSSGNet by the same first author. Differs from it in: classes that are absent, and images without any labelled pixel,
cost 0; nothing waits for a GPU.

Letters: B batch, K classes, N pixels of a group of images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import fast
from config import IGNORE


def parsing_loss(logits: Tensor, labels: Tensor, lovasz_weight: float = 1.0,
                 group: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    """CE + lovasz_weight * Lovasz of logits (B, K, H, W) and labels (B, H, W), uint8 or int64; parts without gradient.

    Computed on `group` consecutive images at a time and averaged over the groups: the authors' 16 images on 4 GPUs saw
    4 at a time, and so the gradient does not depend on how a batch is spread over processes or accumulation steps.
    """
    groups = list(zip(logits.split(group), labels.split(group)))
    ce = torch.stack([cross_entropy(x, y) for x, y in groups]).mean()
    lovasz = torch.stack([lovasz_softmax(x, y) for x, y in groups]).mean()
    return ce + lovasz_weight * lovasz, {"ce": ce.detach(), "lovasz": lovasz.detach()}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled pixels; 0, not nan, where there is none."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


@fast.replaced_by(fast.lovasz_softmax, on=("cpu",))
def lovasz_softmax(logits: Tensor, labels: Tensor, ignore: int = IGNORE) -> Tensor:
    """logits (B, K, H, W), labels (B, H, W) of any integer type -> scalar in fp32 or better.

    The cost of a class is the weighted sum of its errors, 1 - p where the class is, p elsewhere; the mean is over the
    classes present. Ignored pixels have no error: they come last in the order, where the weights no longer matter.
    """
    probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1).transpose(0, 1).flatten(1)
    labels = labels.flatten()                                                            # (N,), probs (K, N)
    truth = labels == torch.arange(len(probs), device=labels.device).unsqueeze(1)        # (K, N)
    errors = torch.where(truth, 1 - probs, probs) * (labels != ignore)
    costs = (errors * lovasz_weights(errors.detach(), truth)).sum(1)                     # (K,); the weights are constants
    present = truth.any(1)
    return (costs * present).sum() / present.sum().clamp(min=1)


@fast.replaced_by(fast.lovasz_weights)
def lovasz_weights(errors: Tensor, truth: Tensor) -> Tensor:
    """errors (K, N) in [0, 1], truth (K, N) bool -> weight of each error, (K, N); of no meaning where a class is absent.

    Call the pixels of a class wrong one after the other, largest error first: a weight is the step that the Jaccard loss
    1 - intersection / union takes at its pixel.
    """
    order = errors.argsort(1, descending=True)
    hit = truth.gather(1, order).to(errors.dtype)
    total = hit.sum(1, keepdim=True)
    jaccard = 1 - (total - hit.cumsum(1)) / (total + (1 - hit).cumsum(1))
    steps = torch.diff(jaccard, prepend=torch.zeros_like(total), dim=1)
    return torch.empty_like(errors).scatter_(1, order, steps)

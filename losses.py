"""Cross-entropy and Lovasz-softmax, the "CE + mIoU loss" of section 4.5.

Source of the second: Berman et al., The Lovasz-Softmax loss (arXiv 1705.08790) and
https://github.com/bermanmaxim/LovaszSoftmax (MIT), over the classes present and a group of images at once, as in CDGNet
and BSSGNet by the same first author. Differs from it in:
  - the weights of the errors are constants for the gradient, so they are computed without a graph, in closed form: no
    differences of neighbouring fp32 values, which lose most of their digits;
  - errors are sorted as integers, several times faster on a CPU than floats;
  - classes that are absent, and images without any labelled pixel, cost 0; nothing waits for a GPU.

Letters: B batch, K classes, N pixels of a group of images.
"""
import torch
import torch.nn.functional as F


def parsing_loss(logits: torch.Tensor, labels: torch.Tensor, lovasz_weight: float = 1.0, group: int = 4,
                 ignore: int = 255) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """CE + lovasz_weight * Lovasz of logits (B, K, H, W) and labels (B, H, W), uint8 or int64; parts without gradient.

    Computed on `group` consecutive images at a time and averaged over the groups: the authors' 16 images on 4 GPUs saw
    4 at a time, and so the gradient does not depend on how a batch is spread over processes or accumulation steps.
    """
    groups = list(zip(logits.split(group), labels.split(group)))
    ce = torch.stack([cross_entropy(x, y, ignore) for x, y in groups]).mean()
    lovasz = torch.stack([lovasz_softmax(x, y, ignore) for x, y in groups]).mean()
    return ce + lovasz_weight * lovasz, {"ce": ce.detach(), "lovasz": lovasz.detach()}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore: int = 255) -> torch.Tensor:
    """Mean over the labelled pixels; 0, not nan, where there is none."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)


def lovasz_softmax(logits: torch.Tensor, labels: torch.Tensor, ignore: int = 255) -> torch.Tensor:
    """logits (B, K, H, W), labels (B, H, W) of any integer type -> scalar in fp32 or better.

    The cost of a class is the weighted sum of its errors, 1 - p where the class is, p elsewhere; the mean is over the
    classes present. Ignored pixels have no error: they come last in the order, where the weights no longer matter.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs = logits.softmax(1)                                                            # (B, K, H, W)
    valid = labels != ignore
    slopes, cost, present = [], probs.new_zeros(()), probs.new_zeros(())
    with torch.no_grad():
        for c, p in enumerate(probs.unbind(1)):                                          # (B, H, W)
            truth = labels == c
            if p.device.type == "cpu" and not truth.any():                               # to ask a GPU would be to wait
                slopes.append(torch.zeros_like(p))
                continue
            errors = torch.where(truth, 1 - p, p) * valid
            weights = lovasz_weights(errors.flatten(), truth.flatten()).view_as(p) * valid
            slopes.append(torch.where(truth, -weights, weights))                         # of the cost, over p
            cost = cost + (weights * errors).sum()
            present = present + truth.any()
        slopes = torch.stack(slopes, dim=1)                                              # (B, K, H, W)
    linear = (probs * slopes).sum()                                                      # the cost up to a constant
    return (cost + (linear - linear.detach())) / present.clamp(min=1)


def lovasz_weights(errors: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """errors (N,) in [0, 1], truth (N,) bool -> weight of each error, (N,); all 0 where the class is absent.

    Call the pixels wrong one after the other, largest error first: a weight is the step that the Jaccard loss
    1 - intersection / union takes at its pixel. A pixel of the class takes 1 / union (it leaves the intersection), any
    other intersection / (union * (union - 1)) (it joins the union); union and intersection after the step.
    """
    integer = torch.int32 if errors.dtype == torch.float32 else torch.int64
    one = torch.ones_like(errors[:1]).view(integer)
    # Bits of floats >= 0 have the floats' order; the lowest bit says whose error it is and saves a look-up.
    keys, order = ((one - errors.view(integer)) * 2 + truth).sort()                      # largest error first
    hit = (keys & 1).bool()
    intersection = truth.sum(dtype=torch.int32) - hit.cumsum(0, dtype=torch.int32)
    union = intersection + torch.arange(1, len(keys) + 1, dtype=torch.int32, device=keys.device)
    intersection = intersection.to(errors.dtype)
    steps = torch.where(hit, 1, intersection / (union - 1).clamp(min=1)) / union
    return torch.empty_like(errors).scatter_(0, order, steps)

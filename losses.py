"""Cross-entropy and Lovasz-softmax, the "CE + mIoU loss" of section 4.5.

Source of the second: Berman et al., The Lovasz-Softmax loss (arXiv 1705.08790) and
https://github.com/bermanmaxim/LovaszSoftmax (MIT): over the classes present, the whole group of images at once.
Differs from it in: all classes are sorted together; a group without any labelled pixel costs 0 instead of failing.

Letters: B batch, K classes, N pixels of a group of images.
"""
import torch
import torch.nn.functional as F


def lovasz_softmax(logits: torch.Tensor, labels: torch.Tensor, ignore: int = 255) -> torch.Tensor:
    """logits (B, K, H, W), labels (B, H, W) of any integer type -> scalar, at least fp32.

    For a class: errors e = |1[y = c] - p_c| in descending order, weighted by the steps that the Jaccard loss takes when
    the pixels are called wrong one after the other in that order.
    """
    num_classes = logits.shape[1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs = logits.softmax(1).transpose(0, 1).flatten(1)                                 # (K, N)
    labels = labels.flatten().long()
    valid = labels != ignore
    truth = F.one_hot(labels.where(valid, num_classes), num_classes + 1).T[:num_classes]
    truth = truth.to(probs.dtype)                                                        # (K, N)
    errors = ((truth - probs).abs() * valid)                                             # ignored pixels: last, cost 0
    order = errors.detach().argsort(dim=1, descending=True)
    hits = truth.gather(1, order).cumsum(1)
    misses = (valid.to(probs.dtype).expand_as(truth).gather(1, order)).cumsum(1) - hits
    total = truth.sum(1, keepdim=True)
    jaccard = 1 - (total - hits) / (total + misses).clamp(min=1)
    weights = jaccard.diff(dim=1, prepend=jaccard.new_zeros(num_classes, 1))
    per_class = (errors.gather(1, order) * weights).sum(1)
    present = total.squeeze(1) > 0
    return (per_class * present).sum() / present.sum().clamp(min=1)


def parsing_loss(logits: torch.Tensor, labels: torch.Tensor, lovasz_weight: float = 1.0, group: int = 4,
                 ignore: int = 255) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """CE + lovasz_weight * Lovasz of logits (B, K, H, W) and labels (B, H, W), uint8 or int64.

    Computed on `group` consecutive images at a time and averaged over the groups: the authors' 16 images on 4 GPUs saw 4
    at a time, and so the gradient does not depend on how a batch is spread over processes or accumulation steps.
    """
    ce, lovasz = [], []
    for logits_group, labels_group in zip(logits.split(group), labels.split(group)):
        ce.append(cross_entropy(logits_group, labels_group, ignore))
        lovasz.append(lovasz_softmax(logits_group, labels_group, ignore))
    ce, lovasz = torch.stack(ce).mean(), torch.stack(lovasz).mean()
    return ce + lovasz_weight * lovasz, {"ce": ce.detach(), "lovasz": lovasz.detach()}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore: int) -> torch.Tensor:
    """Mean over labelled pixels; 0, not nan, where there is none."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore, reduction="sum")
    return total / (labels != ignore).sum().clamp(min=1)

"""Cross-entropy and Lovasz-softmax, the "CE + mIoU loss" of section 4.5.

Source of the second: Berman et al., The Lovasz-Softmax loss (arXiv 1705.08790) and
https://github.com/bermanmaxim/LovaszSoftmax (MIT): over the classes present, the whole group of images at once.
Differs from it in: all classes are sorted together; a group without any labelled pixel costs 0 instead of failing.

Letters: B batch, K classes, P of them present, N pixels of a group of images.
"""
import torch
import torch.nn.functional as F


def lovasz_softmax(logits: torch.Tensor, labels: torch.Tensor, ignore: int = 255) -> torch.Tensor:
    """logits (B, K, H, W), labels (B, H, W) of any integer type -> scalar, at least fp32.

    For a class: errors e = |1[y = c] - p_c| in descending order, weighted by the steps that the Jaccard loss takes when
    the pixels are called wrong one after the other in that order. Mean over the classes present.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.flatten()
    classes = labels.unique().long()
    classes = classes[classes != ignore]
    if not len(classes):
        return 0 * logits.sum()
    probs = logits.softmax(1)[:, classes].transpose(0, 1).flatten(1)                     # (P, N)
    truth = labels == classes[:, None]                                                   # (P, N)
    valid = labels != ignore                                                             # (N)
    errors = (truth.to(probs.dtype) - probs).abs() * valid                               # (P, N)
    return (errors * jaccard_steps(errors.detach(), truth, valid)).sum() / len(classes)


@torch.no_grad()
def jaccard_steps(errors: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The weight of each pixel's error (P, N): the step of the Jaccard loss at its place in the descending order.

    Constants for the gradient, which goes through the errors alone. Pixels that are not valid make no step.
    """
    order = descending_order(errors)
    hits = truth.gather(1, order).cumsum(1, dtype=errors.dtype)                          # exact: at most 2^24 pixels
    misses = valid[order].cumsum(1, dtype=errors.dtype) - hits
    total = hits[:, -1:]
    jaccard = 1 - (total - hits) / (total + misses)
    steps = jaccard.diff(dim=1, prepend=jaccard.new_zeros(len(errors), 1))
    return torch.empty_like(errors).scatter_(1, order, steps)


def descending_order(errors: torch.Tensor) -> torch.Tensor:
    """argsort of the rows of non-negative `errors`, largest first.

    On a CPU NumPy's vectorised sort of integers does it ten times as fast as torch.argsort: the bits of non-negative floats
    are in the floats' order, so that (bits, place) packed into 64 bits sort as the errors do.
    """
    if errors.device.type != "cpu" or errors.dtype != torch.float32:
        return errors.argsort(1, descending=True)
    packed = (0x7FFFFFFF - errors.view(torch.int32).long()) << 32 | torch.arange(errors.shape[1])
    packed.numpy().sort(axis=1)                                                          # in the tensor's own memory
    return packed & 0xFFFFFFFF


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

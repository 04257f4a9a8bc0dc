"""losses.py against naive loops, the Jaccard loss of sets and PyTorch's cross-entropy."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from losses import cross_entropy, lovasz_softmax, lovasz_weights, parsing_loss


def problem(b=2, k=5, h=4, w=3, classes=None, seed=0, void=0.2):
    torch.manual_seed(seed)
    logits = torch.randn(b, k, h, w, dtype=torch.float64) * 2
    labels = torch.randint(classes or k, (b, h, w))
    labels[torch.rand(b, h, w) < void] = 255
    return logits.requires_grad_(), labels


def naive_lovasz(logits, labels, ignore=255):
    """Lovász-Softmax in loops over classes and pixels."""
    k = logits.shape[1]
    pixels = [(i, y, x) for i, y, x in itertools.product(*map(range, labels.shape)) if labels[i, y, x] != ignore]
    exps = logits.exp()
    losses = []
    for c in range(k):
        errors = []
        for i, y, x in pixels:
            p = exps[i, c, y, x] / exps[i, :, y, x].sum()
            mine = int(labels[i, y, x]) == c
            errors.append((1 - p if mine else p, mine))
        total = sum(mine for _, mine in errors)
        if total == 0:
            continue
        errors.sort(key=lambda pair: -float(pair[0].detach()))
        loss, before, hits, misses = 0, 0, 0, 0
        for error, mine in errors:
            hits, misses = hits + mine, misses + (not mine)
            jaccard = 1 - (total - hits) / (total + misses)
            loss = loss + error * (jaccard - before)
            before = jaccard
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("classes", [5, 3, 1])
def test_lovasz_against_the_formula(classes, both_forms):
    logits, labels = problem(classes=classes)
    loss, expected = lovasz_softmax(logits, labels), naive_lovasz(logits, labels)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


def test_weights_extend_the_jaccard_loss(both_forms):
    """At errors of 0 and 1, the weighted sum is 1 - |intersection| / |union|, for every set of errors."""
    for n_truth in range(1, 6):
        truth = torch.tensor([True] * n_truth + [False] * (6 - n_truth))
        for wrong in itertools.product((0.0, 1.0), repeat=6):
            errors = torch.tensor(wrong, dtype=torch.float64)
            predicted = truth ^ errors.bool()
            jaccard = 1 - (predicted & truth).sum() / (predicted | truth).sum().double()
            assert torch.isclose((errors * lovasz_weights(errors[None], truth[None])).sum(), jaccard)


def test_lovasz_of_ties(both_forms):
    logits, labels = problem(void=0)
    logits = torch.zeros_like(logits)                      # every error of a class is 0.8 or 0.2
    torch.testing.assert_close(lovasz_softmax(logits, labels), naive_lovasz(logits, labels))


def test_lovasz_of_saturated_predictions(both_forms):
    labels = torch.randint(4, (1, 5, 5))
    right = F.one_hot(labels, 4).permute(0, 3, 1, 2).float() * 1e4
    assert lovasz_softmax(right, labels) == 0
    torch.testing.assert_close(lovasz_softmax(-right, labels), torch.tensor(1.0), atol=0.05, rtol=0)


def test_ignored_pixels_do_not_matter(both_forms):
    logits, labels = problem()
    void = labels == 255
    assert void.any()
    noise = logits + 100 * torch.randn_like(logits) * void.unsqueeze(1)
    for loss in (lovasz_softmax, cross_entropy):
        torch.testing.assert_close(loss(noise, labels), loss(logits, labels))
        slope, = torch.autograd.grad(loss(logits, labels), logits)
        assert (slope.transpose(0, 1)[:, void] == 0).all()


def test_images_without_a_labelled_pixel(both_forms):
    logits, labels = problem(b=5)
    labels[:] = 255
    loss, parts = parsing_loss(logits, labels)
    assert loss == 0 and parts["ce"] == 0 and parts["lovasz"] == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_the_loss_is_the_mean_over_groups_of_images():
    logits, labels = problem(b=6)
    labels[4:] = 255                                       # the last group has no labelled pixel
    loss, parts = parsing_loss(logits, labels, lovasz_weight=0.3, group=4)
    torch.testing.assert_close(parts["ce"], F.cross_entropy(logits[:4], labels[:4], ignore_index=255) / 2)
    torch.testing.assert_close(parts["lovasz"], naive_lovasz(logits[:4], labels[:4]) / 2)
    torch.testing.assert_close(loss.detach(), parts["ce"] + 0.3 * parts["lovasz"])


def test_the_split_into_processes_or_steps_does_not_matter():
    logits, labels = problem(b=8)
    full, _ = parsing_loss(logits, labels, group=2)
    for share in (4, 2):
        parts = [parsing_loss(x, y, group=2)[0] for x, y in zip(logits.split(share), labels.split(share), strict=True)]
        torch.testing.assert_close(torch.stack(parts).mean(), full)
        torch.testing.assert_close(torch.autograd.grad(torch.stack(parts).mean(), logits, retain_graph=True),
                                   torch.autograd.grad(full, logits, retain_graph=True))
    assert abs(parsing_loss(logits, labels, group=4)[0] - full) > 1e-4          # ... but the group size does


def test_single_and_half_precision(both_forms):
    logits, labels = problem(b=4, k=20, h=60, w=50)
    exact = lovasz_softmax(logits, labels)
    slope, = torch.autograd.grad(exact, logits)
    single = logits.detach().float().requires_grad_()
    loss = lovasz_softmax(single, labels)
    assert loss.dtype == torch.float32 and abs(loss - exact) < 1e-6
    assert (torch.autograd.grad(loss, single)[0] - slope).norm() < 1e-4 * slope.norm()
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = parsing_loss(logits.detach().bfloat16().requires_grad_(), labels)
    assert loss.dtype == torch.float32 and abs(parts["lovasz"] - exact) < 1e-3

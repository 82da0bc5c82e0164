"""What a promptable detector returns, and the losses of its kind (DETR, arXiv 2005.12872; SAM3, arXiv 2511.16719)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from ..parts.regions import part_regions

# Weights of the losses, and of the same terms in the matching of queries to regions, as in DETR and Mask2Former.
WEIGHTS: Mapping[str, float] = {"score": 2.0, "box": 5.0, "giou": 2.0, "mask": 5.0, "dice": 5.0, "presence": 1.0}
SMALLEST_REGION = 4  # cells of the mask grid; smaller connected regions are left out unless there is nothing else
LARGE = 1e6  # stands for the cost of what is no number
MOST_REGIONS = 16  # of one part in one image, the largest


class Detections(NamedTuple):
    """What a detector returns for B prompts, as logits where not said otherwise.

    Attributes:
        boxes: [B, Q, 4], left, top, right, bottom in 0..1.
        scores: [B, Q], of each query being an instance of the concept.
        masks: [B, Q, h, w].
        presence: [B, 1], of the concept being in the image at all.
    """

    boxes: Tensor
    scores: Tensor
    masks: Tensor
    presence: Tensor


class Target(NamedTuple):
    """The instances of a concept in one image.

    Attributes:
        boxes: [n, 4], as :class:`Detections` has them.
        masks: bool [n, h, w].
        valid: bool [h, w], pixels that count.
    """

    boxes: Tensor
    masks: Tensor
    valid: Tensor


def instances(labels: Tensor, part: int, valid: Tensor, split: bool = True) -> Target:
    """Return the connected regions of a part in a label map [h, w], or the whole part as one."""
    array = (labels == part).numpy().astype(np.uint8)
    found = list(part_regions(array, 1, split, minimum_area=SMALLEST_REGION))
    found = found or list(part_regions(array, 1, split=False))
    height, width = array.shape
    boxes, masks = torch.zeros(0, 4), torch.zeros(0, height, width, dtype=torch.bool)
    for region in sorted(found, key=lambda region: -int(region.mask.sum()))[:MOST_REGIONS]:
        mask = torch.zeros(1, height, width, dtype=torch.bool)
        bottom, right = region.top + region.height, region.left + region.width
        mask[0, region.top : bottom, region.left : right] = torch.from_numpy(region.mask)
        box = [region.left / width, region.top / height, right / width, bottom / height]
        boxes, masks = torch.cat([boxes, torch.tensor([box])]), torch.cat([masks, mask])
    return Target(boxes, masks, valid)


def detection_losses(detections: Detections, target: Target) -> dict[str, Tensor]:
    """Return the weighted losses of one prompt (B = 1) by name.

    Queries are matched to the instances at the least cost. Scores of the others go to 0, whether or not the concept is
    present: ComfyUI's SAM3 Detect reads scores alone.
    """
    boxes, scores, masks, presence = (tensor[0].float() for tensor in detections)
    target = Target(*(tensor.to(boxes.device).clone() for tensor in target))  # autograd refuses inference tensors
    count = len(target.boxes)
    with torch.no_grad():
        terms = _pairwise(boxes, scores, masks, target)
        cost = torch.stack([WEIGHTS[name] * term for name, term in terms.items()]).sum(0)
    rows, columns = linear_sum_assignment(cost.nan_to_num(LARGE).cpu().numpy()) if count else ([], [])
    truth = torch.zeros_like(scores)
    truth[rows] = 1.0
    losses = {
        "score": sigmoid_focal_loss(scores, truth, alpha=0.5, reduction="sum") / max(count, 1),
        "presence": F.binary_cross_entropy_with_logits(presence, torch.full_like(presence, float(count > 0))),
    }
    if count:
        matched = _pairwise(boxes[rows], scores[rows], masks[rows], Target(*_picked(target, columns)))
        losses |= {name: matched[name].diagonal().mean() for name in ("box", "giou", "mask", "dice")}
    return {name: WEIGHTS[name] * loss for name, loss in losses.items()}


def _picked(target: Target, columns: np.ndarray) -> Target:
    return Target(target.boxes[columns], target.masks[columns], target.valid)


def _pairwise(boxes: Tensor, scores: Tensor, masks: Tensor, target: Target) -> dict[str, Tensor]:
    """Return the cost [Q, n] of every query for every instance, by name."""
    flat, truth = masks[:, target.valid], target.masks[:, target.valid].float()
    area = max(flat.shape[1], 1)
    sigmoid = flat.sigmoid()
    # Binary cross-entropy of every pair as two products: softplus(-x) where the instance is, softplus(x) elsewhere.
    entropy = F.softplus(-flat) @ truth.T + F.softplus(flat) @ (1 - truth).T
    overlap = sigmoid @ truth.T
    return {
        "score": -scores.sigmoid()[:, None].expand(-1, len(truth)),
        "box": torch.cdist(boxes, target.boxes, p=1),
        "giou": 1 - generalized_box_iou(boxes, target.boxes),
        "mask": entropy / area,
        "dice": 1 - (2 * overlap + 1) / (sigmoid.sum(1)[:, None] + truth.sum(1)[None] + 1),
    }

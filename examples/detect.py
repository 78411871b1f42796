"""DETR of transformers on a ViTDet backbone of fastmae, trained on the built-in shapes; prints the box AP of COCO.

    fastmae export RUN --to vitdet --window_size 0 --output backbone && python examples/detect.py backbone

Needs: fastmae, transformers, scipy, pycocotools; and RUN, a pretrained mae_vit_* of colour images of 64×64.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from transformers import DetrConfig, DetrForObjectDetection, VitDetBackbone, VitDetConfig

from fastmae.data.shapes import CLASSES, SIDE, Shapes, make_shapes


def detector(folder: str) -> DetrForObjectDetection:
    """A small DETR with the weights of the backbone in ``folder``, of which every one must fit."""
    model = DetrForObjectDetection(DetrConfig(
        backbone_config=VitDetConfig.from_pretrained(folder), num_labels=len(CLASSES) - 1, num_queries=10, d_model=128,
        encoder_layers=1, decoder_layers=3, encoder_ffn_dim=256, decoder_ffn_dim=256, dropout=0, auxiliary_loss=True,
    ))  # fmt: skip
    model.model.backbone.model.load_state_dict(VitDetBackbone.from_pretrained(folder).state_dict())
    return model


def inputs_of(made: Shapes, folder: str) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Images as the encoder saw them, and labels as DETR takes them: boxes (center, size) as shares of the image."""
    values = json.loads((Path(folder) / "preprocessor_config.json").read_text())
    images = (made.images / np.float32(255) - np.float32(values["image_mean"])) / np.float32(values["image_std"])
    corners = [torch.from_numpy(boxes).view(-1, 2, 2) / SIDE for boxes in made.boxes]
    boxes = [torch.cat([c.mean(dim=1), c[:, 1] - c[:, 0]], dim=1) for c in corners]
    labels = [dict(class_labels=torch.from_numpy(c) - 1, boxes=b) for b, c in zip(boxes, made.classes, strict=True)]
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels


def box_ap(logits: torch.Tensor, boxes: torch.Tensor, labels: list[dict[str, torch.Tensor]]) -> tuple[float, float]:
    """AP and AP50 of COCO in percent, from logits [N, queries, classes + 1] and boxes [N, queries, 4]."""

    def entry(image: int, kind: int, box: torch.Tensor, **more) -> dict:
        corner = torch.cat([box[:2] - box[2:] / 2, box[2:]]) * SIDE  # left, top, width, height
        return dict(image_id=image, category_id=kind, bbox=corner.tolist(), **more)

    scores, truth = logits.softmax(2)[..., :-1], COCO()
    found = [entry(n, c, boxes[n, q], score=scores[n, q, c].item()) for n, q, c in np.ndindex(*scores.shape)]
    known = [entry(n, c.item(), box) for n, of in enumerate(labels) for c, box in zip(*of.values(), strict=True)]
    known = [one | dict(id=i, iscrowd=0, area=one["bbox"][2] * one["bbox"][3]) for i, one in enumerate(known, 1)]
    kinds, names = [dict(id=kind) for kind in range(scores.shape[2])], [dict(id=n) for n in range(len(labels))]
    truth.dataset = dict(images=names, categories=kinds, annotations=known)
    truth.createIndex()
    scored = COCOeval(truth, truth.loadRes(found), "bbox")
    scored.evaluate(), scored.accumulate(), scored.summarize()
    return 100 * scored.stats[0], 100 * scored.stats[1]


def main(folder: str, count: int = 4000, steps: int = 2500, batch_size: int = 32, held_out: int = 200) -> list[float]:
    torch.manual_seed(0)
    model, losses = detector(folder), []
    images, labels = inputs_of(make_shapes(np.arange(count)), folder)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 7e-4, total_steps=steps, pct_start=0.1)
    for batch in torch.randint(count, (steps, batch_size)):
        loss = model(pixel_values=images[batch], labels=[labels[n] for n in batch]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step()
        losses.append(loss.item())
    images, labels = inputs_of(make_shapes(np.arange(10**6, 10**6 + held_out)), folder)
    found = model.eval().requires_grad_(False)(pixel_values=images)
    print("box AP {:.1f} %, AP50 {:.1f} %".format(*box_ap(found.logits, found.pred_boxes, labels)))
    return losses


if __name__ == "__main__":
    main(sys.argv[1])

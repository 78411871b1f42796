"""A LightningModule around a model of fastmae.

    python examples/lightning_module.py

Needs: fastmae, lightning, scikit-learn (for its digits).
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

import fastmae


class Pretraining(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        model = fastmae.MaskedAutoencoderViT(
            img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=2, num_heads=2, decoder_embed_dim=32,
            decoder_depth=1, decoder_num_heads=2, norm_pix_loss=True,
        )  # fmt: skip
        self.loss_of = fastmae.MAELoss(model)  # draws its masks, and computes nothing that the loss does not need
        self.losses: list[float] = []

    def training_step(self, images: torch.Tensor, _: int) -> torch.Tensor:
        loss = self.loss_of(images)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.05)


def main(epochs: int = 4) -> list[float]:
    lightning.seed_everything(0, verbose=False)
    pixels = torch.tensor(load_digits().images * 255 / 16).to(torch.uint8)[..., None]  # [N, 8, 8, 1]
    module = Pretraining()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(pixels, batch_size=256, shuffle=True))
    return module.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {len(losses)} steps")

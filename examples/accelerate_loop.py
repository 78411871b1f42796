"""A loop with Hugging Face Accelerate around a model of fastmae; `accelerate launch` runs it on several GPUs.

    python examples/accelerate_loop.py

Needs: fastmae, accelerate, scikit-learn (for its digits).
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

import fastmae


def main(epochs: int = 4) -> list[float]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    pixels = torch.tensor(load_digits().images * 255 / 16).to(torch.uint8)[..., None]  # [N, 8, 8, 1]
    loader = DataLoader(pixels, batch_size=256, shuffle=True)
    model = fastmae.MaskedAutoencoderViT(
        img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=2, num_heads=2, decoder_embed_dim=32,
        decoder_depth=1, decoder_num_heads=2, norm_pix_loss=True,
    )  # fmt: skip
    loss_of = fastmae.MAELoss(model)  # draws its masks, and computes nothing that the loss does not need
    optimizer = torch.optim.AdamW(loss_of.parameters(), lr=3e-3, weight_decay=0.05)
    loss_of, optimizer, loader = accelerator.prepare(loss_of, optimizer, loader)

    losses = []
    for _ in range(epochs):
        for images in loader:
            loss = loss_of(images)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {len(losses)} steps")

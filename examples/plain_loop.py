"""A plain training loop around transformers' ViTMAE, made faster by one line.

    python examples/plain_loop.py

Needs: fastmae, transformers, scikit-learn (for its digits).
"""

import torch
from sklearn.datasets import load_digits
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import fastmae


def digits() -> torch.Tensor:
    """Gray images of 8×8 pixels as float [N, 1, 8, 8], normalised."""
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
    return (images - images.mean()) / images.std()


def main(epochs: int = 4, batch_size: int = 256) -> list[float]:
    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=256, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=128, norm_pix_loss=True,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    fastmae.accelerate(model)  # the one line; tune=True measures which implementations are fastest on this CPU

    images, losses = digits(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(epochs):
        for indices in torch.randperm(len(images)).split(batch_size):
            loss = model(pixel_values=images[indices]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {len(losses)} steps")

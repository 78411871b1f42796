"""transformers' Trainer with ViTMAE, made faster by one line.

    python examples/transformers_trainer.py  # with several GPUs: torchrun --nproc_per_node gpu examples/…

Needs: fastmae, transformers, accelerate, scikit-learn (for its digits).
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTMAEConfig, ViTMAEForPreTraining

import fastmae


class Digits(Dataset):
    """Gray images of 8×8 pixels, normalised, under the name of the model's argument."""

    def __init__(self) -> None:
        images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
        self.images = (images - images.mean()) / images.std()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index]}


def main(epochs: int = 4) -> list[float]:
    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=256, decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=128, norm_pix_loss=True,
    )  # fmt: skip
    model = fastmae.accelerate(ViTMAEForPreTraining(config))  # the one line
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=256,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Digits())
        trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f} in {len(losses)} steps")

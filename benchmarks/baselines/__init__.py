"""Other implementations of the masked autoencoder, brought to the same weights; a file each."""

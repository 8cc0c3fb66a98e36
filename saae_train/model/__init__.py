"""The model: frozen backbone, feature space and self-attention autoencoder."""

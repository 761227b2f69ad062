"""The networks: the autoencoder and its parts."""

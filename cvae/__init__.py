"""The conditional variational autoencoder of Sohn, Lee and Yan (2015) on image quadrants, in plain PyTorch."""

__version__ = "0.1.0"

"""The networks: encoder, classifier and masked autoencoder."""

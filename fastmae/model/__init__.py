"""The model: vit.py has the parts, mae.py the masked autoencoder, reference.py its plain formulation."""

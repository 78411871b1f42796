"""The models.

vit.py has the parts, mae.py the masked autoencoder, cross.py CrossMAE, presets.py the models by name, classifier.py the
fine-tuned encoder, and reference.py the plain formulation of the masked autoencoder.
"""

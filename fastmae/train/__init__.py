"""Training. pretrain.py is the story, read top to bottom; the other files are its parts and do not know each other."""

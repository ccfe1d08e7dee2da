"""The encoder zoo: image towers, text towers, captioners, and the models made of them."""

"""Evaluation of a frozen backbone: k-NN classification and attention maps. Nothing here trains a
backbone."""

"""Recipes: one module each, with `recipe() -> Run` and, where it makes sense, `small() -> Run`.

A new recipe is a new file here, and no list.
"""

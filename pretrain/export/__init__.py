"""A trained model as a directory that open_clip or transformers loads, with a model card; and back again."""

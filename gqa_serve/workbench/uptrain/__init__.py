"""`gqa-serve uptrain`: continue pretraining a converted checkpoint, or train a small model from scratch."""

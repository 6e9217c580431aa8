"""Where weights come from: the hub, safetensors directories, GGUF files.

`hub.resolve_model` turns what the user typed into a path; `checkpoint.open_checkpoint` turns the
path into a `Checkpoint`, which hands out a Hugging Face style config and tensors under Hugging Face
names, one at a time. Nothing here knows about models, devices or engines, and nothing here
unpickles anything.
"""

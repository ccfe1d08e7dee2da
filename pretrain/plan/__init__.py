"""What a run would take on GPUs that are not here: `python -m pretrain.launch --plan --gpus 256 --gpu h200`.

The step is run on paper: tensors have shapes and no numbers, ranks have no process, and what is counted is
what every run counts (`pretrain.flops`, `pretrain.memory`), not what a formula says beside it.
"""
